r"""A design as equations, in plain Unicode and in LaTeX.

Both come from one list of lines, in which columns' names and words are marked by
private characters: the text drops the marks, LaTeX turns what they hold into `\text`.
"""

from __future__ import annotations

import re

from deconfound_jax.causal.builders import modifier
from deconfound_jax.structs import Design, Roles, Term

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_NAME, _PROSE = ("\ue000", "\ue001"), ("\ue002", "\ue003")  # marks around a column's name, and around words
_LATEX = {
    "φ̄": r"\bar{\phi}", "φ": r"\phi", "β": r"\beta", "γ": r"\gamma", "ε": r"\varepsilon", "σ": r"\sigma", "η": r"\eta",
    "π": r"\pi", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "δ": r"\delta", "ν": r"\nu", "ρ": r"\rho", "Φ": r"\Phi",
    "ℓ": r"\ell", "·": r"\cdot", "−": "-", "~": r"\sim", "|": r"\mid", "≤": r"\leq", "²": "^{2}", "½": r"\frac{1}{2}",
    "′": "'", "…": r"\dots", ",  ": r",\quad ",
}  # fmt: skip


def equations(design: Design, roles: Roles, *, gamma_sd: float = 1.0, control_sd: float = 1.0) -> list[str]:
    """The design as equations, one string a line, in plain Unicode.

    Args:
      design: family, response and terms.
      roles: names of text, outcome and exposure.
      gamma_sd: prior sd of the endogenous coefficient, in sd of y per sd of p.
      control_sd: prior sd of the control function's coefficient c₀.

    Returns:
      Likelihood, first stage where there is one, f, priors of the terms, scale.
      Names are not escaped: whoever puts them into HTML does that.

    Example:
      >>> equations(Design.parse("linear(hour)"), Roles(text="x", outcome="y"))[0]
      'y = f(x) + b₁·hour + ε,  ε ~ N(0, σ²)'
    """
    return [re.sub("[\ue000-\ue003]", "", line) for line in _lines(design, roles, gamma_sd, control_sd)]


def latex(design: Design, roles: Roles, *, gamma_sd: float = 1.0, control_sd: float = 1.0) -> list[str]:
    r"""The same equations as LaTeX, one string a line, for a display or an `aligned` environment.

    Example:
      >>> print(latex(Design(), Roles(text="x", outcome="y"))[0])
      \text{y} = f(\text{x}) + \varepsilon ,\quad \varepsilon  \sim  \mathcal{N}(0, \sigma ^{2})
    """
    return [_to_latex(line) for line in _lines(design, roles, gamma_sd, control_sd)]


def _lines(design: Design, roles: Roles, gamma_sd: float, control_sd: float) -> list[str]:
    """The equations with every column's name and every word marked."""
    terms, x = list(enumerate(design.terms, 1)), _q(roles.text)
    summands = [_summand(i, term, design, roles) for i, term in terms]
    lines = _likelihood(design, roles, " + ".join([f"f({x})", *filter(None, summands)]))
    lines += _first_stages(design, roles) + _guardrail(design, roles) + _selection(design, roles)
    lines.append(f"f({x}) = φ({x})·β,  β ~ N(0, s²I),  s{_t(' learned')}")
    lines += [_prior(i, term, roles) for i, term in terms if term.kind not in ("endogenous", "guardrail")]
    several = "ⱼ" * (len(design.endogenous_terms) > 1)
    priors = [f"γ{several} ~ N(0, {gamma_sd**2:g})", f"c{several or '₀'} ~ N(0, {control_sd**2:g})"]
    priors = priors * bool(design.endogenous) + [f"κ ~ N(0, {control_sd**2:g})"] * bool(design.guardrail)
    return lines + [",  ".join(priors) + _t(" on standardised scales")] * bool(priors)


def _q(name: str) -> str:
    return name.join(_NAME)


def _t(words: str) -> str:
    return words.join(_PROSE)


def _sub(i: int) -> str:
    return str(i).translate(_SUBSCRIPTS)


def _summand(i: int, term: Term, design: Design, roles: Roles) -> str:
    c, x, k = _q(term.column), _q(roles.text), _sub(i)
    if term.kind == "endogenous":
        if len(design.endogenous_terms) == 1:
            return f"γ·{c} + c₀·e"
        j = _sub(design.endogenous_terms.index(term) + 1)
        return f"γ{j}·{c} + c{j}·e{j}"
    if term.kind == "interaction":
        side = modifier(term, roles.text)
        return f"f{k}({x})·{_q(side)}" if side else f"b{k}·{c}·{_q(term.by)}"
    return {
        "linear": f"b{k}·{c}",
        "treatment": f"b{k}·{c} + h{k}·E[{', '.join([c + ' | ' + x, *_before(term, design, roles)])}]",
        "smooth": f"g{k}({c})",
        "embedding": f"g{k}({c})",
        "guardrail": "κ·v",
        "selection": "",
    }.get(term.kind, f"g{k}[{c}]")


def _likelihood(design: Design, roles: Roles, eta: str) -> list[str]:
    y, n = _q(roles.outcome), _q(roles.exposure) if roles.exposure else ""
    if design.response == "empirical_logit":
        return [
            f"y = log(({y} + ½) / ({n} − {y} + ½)),  v = 1/({y} + ½) + 1/({n} − {y} + ½)",
            f"y = {eta} + ε,  ε ~ N(0, σ²v)",
        ]
    if design.family == "normal":
        return [f"{y} = {eta} + ε,  ε ~ N(0, σ²)"]
    if design.family == "student_t":
        return [f"{y} = {eta} + σ·ε,  ε ~ t(ν),  ν = 2 + 1/δ²"]
    rate = f"{n}·exp(η)" if n else "exp(η)"
    law = {
        "bernoulli": "Bernoulli(Φ(η))" if design.selection else "Bernoulli(logistic(η))",
        "binomial": f"Binomial({n}, logistic(η))" if n else "Bernoulli(logistic(η))",
        "beta_binomial": f"BetaBinomial({n or 'n'}, μ/δ², (1 − μ)/δ²),  μ = logistic(η)",
        "poisson": f"Poisson({rate})",
        "negative_binomial": f"NegativeBinomial(m, m + m²δ²){_t(', mean and variance')},  m = {rate}",
    }.get(design.family)
    line = f"{y} ~ {law}" if law else f"P({y} ≤ k) = logistic(aₖ − η),  a₁ < a₂ < …{_t(' learned')}"
    return [line, f"η = {eta}"]


def _exogenous(terms: tuple[Term, ...], roles: Roles) -> list[str]:
    terms = [t for t in terms if t.kind not in ("endogenous", "guardrail", "selection")]
    names = dict.fromkeys(c for t in terms for c in (t.column, t.by))
    return [_q(c) for c in names if c not in ("", "text", roles.text)]


def _before(term: Term, design: Design, roles: Roles) -> list[str]:
    return _exogenous(design.terms[: design.terms.index(term)], roles)


def _first_stages(design: Design, roles: Roles) -> list[str]:
    terms, x, lines = design.endogenous_terms, _q(roles.text), []
    others = _exogenous(design.terms, roles)
    zs = [_q(z) for z in dict.fromkeys(z for term in terms for z in term.instruments)]
    rest = f"({', '.join([f'φ({x})', *others])})"
    for j, term in enumerate(terms, 1):
        p, k = _q(term.column), _sub(j) if len(terms) > 1 else ""
        pushes = [f"π{_sub(i) * (len(zs) > 1)}·{z}" for i, z in enumerate(zs, 1)]
        if k:
            pushes = [f"π{k}·({', '.join(zs)})"]
        errors = [f"e{_sub(i)}" for i in range(1, j)]
        pushes += [f"a{k}·{rest}", *(f"r{k}·{e}" for e in errors), f"U{k}"]
        lines.append(f"{p} = {' + '.join(pushes)}")
        lines.append(f"e{k} = ({p} − E[{p} | {', '.join([x, *others, *zs, *errors])}]) / sd(U{k})")
    return lines


def _guardrail(design: Design, roles: Roles) -> list[str]:
    if not design.guardrail:
        return []
    y2, own = _q(design.guardrail.column), _t("the same terms with coefficients of their own")
    reward = f"{_t('reward of a text')} = f({_q(roles.text)}) − λ·f′({_q(roles.text)})"
    return [f"{y2} = {own} + V,  v = V / sd(V)", f"{reward},  f′{_t(' that of ')}{y2}"]


def _selection(design: Design, roles: Roles) -> list[str]:
    if not (term := design.selection):
        return []
    pushes = [f"π{_sub(i) * (len(term.instruments) > 1)}·{_q(w)}" for i, w in enumerate(term.instruments, 1)]
    known = ", ".join([f"φ({_q(roles.text)})", *_exogenous(design.terms, roles)])
    pushes = " + ".join([*pushes, f"a·({known})", "U"])
    if design.family == "normal":
        return [f"{_q(term.column)} = 1{_t(' where ')}{pushes} > 0,  U ~ N(0, 1),  corr(U, ε) = ρ"]
    latent = f"{_q(roles.outcome)} = 1{_t(' where ')}η + ε > 0,  ε ~ N(0, 1)"
    return [latent, f"{_q(term.column)} = 1{_t(' where ')}{pushes} > 0,  U ~ N(0, 1),  corr(U, ε) = ρ"]


def _prior(i: int, term: Term, roles: Roles) -> str:
    k, c, x, learned = _sub(i), _q(term.column), _q(roles.text), _t(" learned")
    line = f"b{k} ~ N(0, 1){_t(' on standardised ')}{c}"
    if term.kind == "linear":
        return line
    if term.kind == "selection":
        return f"π ~ N(0, 1){_t(' on standardised ')}{', '.join(map(_q, term.instruments))}"
    if term.kind == "treatment":
        return f"b{k}, h{k} ~ N(0, 1){_t(' on standardised ')}{c}{_t(' and what it is expected to be')}"
    if term.kind == "interaction":
        if side := modifier(term, roles.text):
            return f"f{k}({x}) = φ({x})·β{k},  β{k} ~ N(0, s{k}²I),  s{k}{learned},  {_q(side)}{_t(' standardised')}"
        return f"{line}{_t(' times standardised ')}{_q(term.by)}"
    if term.kind == "smooth":
        law = f"GP(0, s{k}², ℓ{k})" if "spline" not in term.options else f"{_t('penalised spline of scale ')}s{k}"
        basis = _t(f" on {term.bases} basis functions")
        return f"g{k} = b{k}·{c} + w{k}({c}) + E[φ | {c}]·m{k},  w{k} ~ {law}{basis},  b{k} ~ N(0, 1)"
    if term.kind == "embedding":
        return f"g{k} = {c}·b{k} + E[φ | {c}]·m{k},  b{k} ~ N(0, s{k}²I),  m{k} ~ N(0, r{k}²I),  s{k}, r{k}{learned}"
    if term.kind == "intercept":
        return f"g{k}[{c}] ~ N(0, s{k}²),  s{k}{_t(' learned: levels declared independent of the text')}"
    if "absorbed" in term.options:
        return f"g{k}[{c}]{_t(' flat: fixed effects')}"
    level, mean = f"g{k}[{c}] = d{k}[{c}] + φ̄[{c}]·m{k},  d{k} ~ N(0, s{k}²)", _t("the level's mean of ")
    return f"{level},  s{k}{learned},  φ̄ = {mean}φ"


def _to_latex(line: str) -> str:
    marked = "\ue000(.*?)\ue001|\ue002(.*?)\ue003"
    place = re.compile(marked + r"|([A-Za-z]{2,})|(N)(?=\()|([₀-₉ⱼₖ]+)|(φ̄|,  |[^\x00-\x7f]|[~|])")

    def one(found: re.Match) -> str:
        name, words, operator, normal, index, symbol = found.groups()
        if name is not None or words is not None:
            text = (words if name is None else name).replace("\\", "\0")
            escaped = re.sub(r"([&%$#_{}])", r"\\\1", text)
            for odd, command in (("\0", "backslash"), ("~", "asciitilde"), ("^", "asciicircum")):
                escaped = escaped.replace(odd, rf"\text{command}{{}}")
            return rf"\text{{{escaped}}}"
        if operator:
            return rf"\operatorname{{{operator}}}"
        if normal:
            return r"\mathcal{N}"
        if index:
            return "_{" + index.translate(_DIGITS).replace("ⱼ", "j").replace("ₖ", "k") + "}"
        drawn = _LATEX[symbol]
        return drawn + " " * drawn[-1:].isalpha()

    return place.sub(one, line).rstrip()
