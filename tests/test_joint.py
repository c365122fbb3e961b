"""The joint step: exact statistics inside the graph, the same gradients as two stages, one compilation."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deconfound_jax.align.groups import epochs, form_groups, pair_index, pair_labels
from deconfound_jax.align.joint import (
    JointBatch,
    fill_pairs,
    init_causal,
    joint_step,
    text_draws,
    update_causal,
)
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.preference import preference_objective
from deconfound_jax.causal import conditional
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.reward import prefer
from deconfound_jax.causal.spec import Rows
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Align, Causal, Dpo, Joint, Newsroom
from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.joint import align_jointly, joint_stage, row_batches, text_features
from deconfound_jax.recipes.stage import Record
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Design, Logs, Pairs, Roles
from deconfound_jax.train.step import adamw, init_state, jit_step

JOINT = Joint(rows=100, warm_rows=300, causal_updates=4, draws=16)


@pytest.fixture(scope="module")
def small():
    """A small newsroom with counts of word classes as features, its decoder and one joint batch."""
    logs, _ = newsroom.simulate(Newsroom(articles=60, weeks=5, topics=8), 0)
    features_nd = np.array([newsroom.parse(t) for t in logs.text], float)
    design = Design.parse("endogenous(popularity ~ z) + category(week)")
    prepared = prepare(logs, features_nd, design)
    words = tokenizer.closed(newsroom.vocabulary(Newsroom(topics=8)))
    decoder = Decoder(DecoderConfig(width=16, layers=1, heads=2, length=24), words.size)
    tokens_nl = words.encode(logs.text, 24)
    params = decoder.init(jax.random.key(0), jnp.asarray(tokens_nl[:1]))
    groups = form_groups(logs.codes("article"), len(logs), 5, 0)[:8]
    phi = np.asarray(prepared.rows.columns_nq[:, :3], np.float32)
    rows = row_batches(prepared.rows, JOINT.rows, 0)
    reference = np.random.default_rng(0).normal(-30, 1, groups.shape).astype(np.float32)
    pairs = Pairs(tokens_nl[groups], reference, np.full((8, 10), 0.5, np.float32), np.ones((8, 10), np.float32))
    batch = JointBatch(rows(0), pairs, phi[groups], np.ones(groups.shape, np.float32))
    return logs, prepared, design, decoder, params, batch, rows, tokens_nl


def test_streamed_statistics_are_the_whole_logs(small):
    _, prepared, *_, rows, _ = small
    state = init_causal(prepared.spec, rows(0), JOINT)
    for i in range(5):  # three batches hold the log, two come after it and must add nothing
        state = update_causal(prepared.spec, JOINT, state, rows(i))
    whole = conditional.moments(prepared.spec, Rows(*[jnp.asarray(f) for f in prepared.rows]))
    chex.assert_trees_all_close(state.moments, jax.tree.map(jnp.asarray, whole), atol=2e-2, rtol=2e-4)
    assert float(state.seen) == 300


def test_after_enough_updates_the_posterior_is_the_separate_fits(small):
    _, prepared, design, *_, rows, _ = small
    separate = fit_prepared(prepared, design, Causal(draws=512))
    state = init_causal(prepared.spec, rows(0), JOINT)
    update = jax.jit(lambda s, r: update_causal(prepared.spec, JOINT, s, r))
    for i in range(60):
        state = update(state, rows(i))
    draws = np.asarray(text_draws(prepared.spec, state, 512, jax.random.key(0)))
    sd = separate["text"].std(0)
    assert np.abs(draws.mean(0) - separate["text"].mean(0)).max() < 0.3 * sd.max()
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.3)


def test_gradients_equal_the_two_stage_functions_at_the_same_posterior(small):
    _, prepared, _, decoder, params, batch, rows, _ = small
    key, optimizer = jax.random.key(3), adamw(1e-3, 10)
    causal = init_causal(prepared.spec, rows(0), JOINT)
    for i in range(3):
        causal = update_causal(prepared.spec, JOINT, causal, rows(i))
    state = init_state(params, optimizer, causal)
    # A linear optimizer shows the gradient as the parameters' change.
    identity = optax.sgd(1.0)
    state = state._replace(opt_state=identity.init(params))
    step = joint_step(prepared.spec, JOINT, preference_objective(decoder), identity, fill_pairs("one"))
    after, _ = step(state, {"beta": jnp.float32(0.3)}, batch._replace(rows=rows(9)), key)

    # Two stages, by hand: the posterior that the step had, draws, labels by pair, the DPO objective's gradient.
    causal = update_causal(prepared.spec, JOINT, causal, rows(9))
    draws_sd = text_draws(prepared.spec, causal, JOINT.draws, jax.random.fold_in(key, 0))
    reward_sn = np.asarray(draws_sd) @ batch.features.reshape(-1, 3).T
    groups = np.arange(40).reshape(8, 5)
    label, weight = pair_labels(reward_sn, groups, float(reward_sn.mean(0).std()), "one")
    two_stage = batch.texts._replace(label_bp=label, weight_bp=weight)
    objective = preference_objective(decoder)

    def loss(p):
        per_example, w, penalty, _ = objective(p, {"beta": jnp.float32(0.3)}, two_stage, key)
        return weighted_mean(per_example, w) + penalty

    gradient = jax.grad(loss)(params)
    joint_gradient = jax.tree.map(lambda a, b: a - b, params, after.params)
    chex.assert_trees_all_close(joint_gradient, gradient, atol=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3


def test_the_policy_waits_for_warm_rows_and_one_trace_serves(small, tmp_path):
    logs, prepared, _, decoder, params, *_, tokens_nl = small
    config = Dpo(steps=4, groups=8, group_size=5, learning_rate=1e-2)
    stage = joint_stage(decoder, prepared.spec, config, JOINT)
    assert stage.steps == 4 + 2  # 300 warm rows are 3 batches; the third may already move
    seen = []

    def watch(state, step):
        change = [
            float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state.params, params)), strict=True)
        ]
        seen.append((step, max(change) > 0))
        return {}

    texts = Texts(tokens_nl, logs.codes("article"))
    align_jointly(decoder, stage, params, texts, prepared, config, Align(equal_texts="drop"), JOINT, 0,
                  Record(tmp_path, "joint", 100), [(1, watch)])  # fmt: skip
    assert seen == [(0, False), (1, False), (2, False), (3, True), (4, True), (5, True), (6, True)]
    assert stage.traces() == 1


def test_a_batch_is_named_by_its_rows_of_the_log(small, monkeypatch):
    logs, prepared, _, decoder, params, *_, tokens_nl = small
    monkeypatch.setattr("deconfound_jax.recipes.joint.train", lambda *given: (given[3], given[8]))
    texts = Texts(tokens_nl, logs.codes("article"), None, np.array([f"k{i}" for i in range(len(tokens_nl))]))
    config = Dpo(steps=4, groups=8, group_size=5)
    batch_at, keys_at = align_jointly(decoder, None, params, texts, prepared, config, Align(equal_texts="drop"), JOINT,
                                      0, None)  # fmt: skip
    named = [[int(key.removeprefix("k")) for key in keys_at(i)] for i in range(4)]
    rows, members_bgl = batch_at(1).rows, batch_at(1).texts.tokens_bgl
    np.testing.assert_allclose(rows.outcome_n, prepared.rows.outcome_n[prepared.row_of_log_n[named[1][:100]]])
    np.testing.assert_array_equal(members_bgl.reshape(40, -1), tokens_nl[named[1][100:]])
    assert len(named[3]) == 40, "the log's 300 rows have come"


def test_the_joint_step_is_traced_once():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(lambda state, frozen, batch, key: (state + batch, {}))
    step = jit_step(traced)
    state = jnp.zeros(3)
    for _ in range(3):
        state, _ = step(state, (), jnp.ones(3), jax.random.key(0))
    with pytest.raises(AssertionError, match="traced"):
        step(jnp.zeros(4), (), jnp.ones(4), jax.random.key(0))


def test_groups_stay_inside_their_value_and_use_every_row_once():
    codes = np.array([0, 0, 0, 1, 1, 2, 0, 0, 1])
    groups = form_groups(codes, 9, 3, seed=0)
    for group in groups:
        members = group[group >= 0]
        assert len(members) > 1 and len(set(codes[members])) == 1
    used = groups[groups >= 0]
    assert len(used) == len(set(used)) == 8  # row 5 is alone in its value
    across = form_groups(None, 9, 3, seed=0)
    assert sorted(across.ravel()) == list(range(9))
    with pytest.raises(ValueError, match="pair_within"):
        form_groups(np.arange(4), 4, 2, 0)


def test_pair_labels_are_prefer_of_the_draws_and_missing_members_weigh_nothing():
    draws_sn = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    groups = np.array([[0, 1, 2], [3, 1, -1]])
    label, weight = pair_labels(draws_sn, groups, 0.7, "one")
    first, second = pair_index(3)
    for p in range(3):
        expected = prefer(draws_sn[:, groups[0, first[p]]], draws_sn[:, groups[0, second[p]]], 0.7)
        assert label[0, p] == pytest.approx(float(expected), abs=1e-6)
    np.testing.assert_array_equal(weight, [[1, 1, 1], [1, 0, 0]])
    _, precise = pair_labels(draws_sn, groups, 0.7, "precision")
    gap = draws_sn[:, 0] - draws_sn[:, 1]
    assert precise[0, 0] == pytest.approx(0.49 / (0.49 + gap.var()), rel=1e-5)


def test_hard_labels_are_the_order_of_the_means_in_the_joint_step_too():
    rng = np.random.default_rng(0)
    draws_sd, features = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=(2, 3, 3)).astype(np.float32)
    pairs = Pairs(np.zeros((2, 3, 1), int), None, None, np.ones((2, 3), np.float32))
    batch = JointBatch(None, pairs, features, np.ones((2, 3), np.float32))
    found = fill_pairs("one", "hard")(None, None, batch, draws_sd, None)
    mean_bg = features @ draws_sd.mean(0)
    first, second = pair_index(3)
    np.testing.assert_array_equal(found.label_bp, mean_bg[:, first] > mean_bg[:, second])


def test_texts_keep_their_own_features_where_the_model_has_its_rows_in_another_order():
    # The same headlines in two weeks: rows equal in text stand together, none are summed.
    n = 12
    headline_n, features_nd = np.arange(n) % 6, np.random.default_rng(0).normal(size=(6, 3))
    columns = {"text": [f"t{i}" for i in headline_n], "week": [f"w{i}" for i in np.arange(n) // 6]}
    columns = {name: np.asarray(value, object) for name, value in columns.items()}
    counts = {"clicks": np.arange(1.0, n + 1), "shown": np.full(n, 100.0)}
    logs = Logs.of(columns | counts, Roles(outcome="clicks", exposure="shown", confounders=("week",)))
    prepared = prepare(logs, features_nd[headline_n], Design.parse("category(week)", response="empirical_logit"))
    assert len(prepared.rows.outcome_n) == n and (prepared.row_of_log_n != np.arange(n)).any()
    standard_nd = (features_nd[headline_n] - prepared.scaling["features.mean"]) / prepared.scaling["features.sd"]
    np.testing.assert_allclose(text_features(prepared), standard_nd, rtol=1e-5)


def test_epochs_give_each_number_once_an_epoch_and_depend_on_the_step_alone():
    at = epochs(10, 5, seed=1)
    assert sorted(np.concatenate([at(0), at(1)])) == list(range(10))
    np.testing.assert_array_equal(at(7), epochs(10, 5, seed=1)(7))
    assert not np.array_equal(np.concatenate([at(0), at(1)]), np.concatenate([at(2), at(3)]))
    assert len(epochs(3, 8, seed=0)(4)) == 8
