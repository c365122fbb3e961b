"""Pooling by hand-made numbers, features from files, and the cache."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from deconfound_jax.models import weights
from deconfound_jax.models.features import POOLINGS, cached, pool, read_features

HIDDEN = jnp.array([[[1.0, 2.0], [3.0, 5.0], [100.0, 100.0]], [[1.0, 1.0], [2.0, 0.0], [4.0, -1.0]]])
MASK = jnp.array([[True, True, False], [True, True, True]])
TABLE = np.array([[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]], np.float32)
ROWS = np.array([2, 0, 0, 1], np.int32)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("sum+length", [[4.0, 7.0, 2.0], [7.0, 0.0, 3.0]]),
        ("mean", [[2.0, 3.5], [7 / 3, 0.0]]),
        ("last", [[3.0, 5.0], [4.0, -1.0]]),
    ],
)
def test_pooling_by_hand(pooling, expected):
    np.testing.assert_allclose(pool(HIDDEN, MASK, pooling), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(pool, static_argnums=2)(HIDDEN, MASK, pooling), expected, rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_stands_behind_the_mask_is_not_seen(pooling):
    expected = pool(HIDDEN, MASK, pooling)
    behind = jnp.where(MASK[:, :, None], HIDDEN, jnp.nan)
    np.testing.assert_array_equal(pool(behind, MASK, pooling), expected)
    longer = jnp.concatenate([behind, jnp.full((2, 4, 2), jnp.nan)], axis=1)
    longer_mask = jnp.concatenate([MASK, jnp.zeros((2, 4), bool)], axis=1)
    np.testing.assert_array_equal(pool(longer, longer_mask, pooling), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_empty_text_pools_to_zeros(pooling):
    np.testing.assert_array_equal(pool(HIDDEN, jnp.zeros_like(MASK), pooling), 0.0)


def test_last_is_the_last_true_position_even_after_a_gap():
    mask = jnp.array([[True, False, True], [False, True, False]])
    np.testing.assert_array_equal(pool(HIDDEN, mask, "last"), [[100.0, 100.0], [2.0, 0.0]])


def test_sums_keep_a_count_that_a_mean_blurs():
    once, twice = jnp.ones((1, 1, 2)), jnp.ones((1, 2, 2))
    np.testing.assert_array_equal(pool(once, jnp.ones((1, 1)), "mean"), pool(twice, jnp.ones((1, 2)), "mean"))
    assert (pool(once, jnp.ones((1, 1)), "sum+length") != pool(twice, jnp.ones((1, 2)), "sum+length")).all()


def test_half_precision_is_summed_in_float32():
    hidden = jnp.ones((1, 3000, 1), jnp.bfloat16)
    np.testing.assert_array_equal(pool(hidden, jnp.ones((1, 3000), bool), "sum+length"), [[3000.0, 3000.0]])


def test_pooling_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="features.pooling: expected one of .* got 'means'; the nearest is 'mean'"):
        pool(HIDDEN, MASK, "means")
    with pytest.raises(AssertionError):
        pool(HIDDEN, MASK[:, :2], "mean")


def write(path, arrays):
    if path.suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        weights.save_safetensors(path, arrays)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_the_only_array_is_read(tmp_path, suffix, dtype):
    features = read_features(write(tmp_path / f"f{suffix}", {"f": TABLE.astype(dtype)}), 3)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, TABLE.astype(dtype))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_table_of_distinct_texts_is_spread_over_the_log(tmp_path, suffix):
    arrays = {"headline": TABLE, "headline_row": ROWS, "lede": -TABLE, "lede_row": ROWS[::-1]}
    path = write(tmp_path / f"f{suffix}", arrays)
    np.testing.assert_array_equal(read_features(path, 4, text_column="headline"), TABLE[[2, 0, 0, 1]])
    np.testing.assert_array_equal(read_features(path, 4, "lede", "headline"), -TABLE[[1, 0, 0, 2]])


def test_arrays_are_chosen_by_name_then_by_being_alone_then_by_text(tmp_path):
    two = write(tmp_path / "two.npz", {"a": TABLE, "b": -TABLE})
    np.testing.assert_array_equal(read_features(two, 3, array="b"), -TABLE)
    np.testing.assert_array_equal(read_features(two, 3, text_column="a"), TABLE)
    one = write(tmp_path / "one.npz", {"a": TABLE, "note": np.array(["x", "y"])})
    np.testing.assert_array_equal(read_features(one, 3, text_column="headline"), TABLE)
    brain = write(tmp_path / "brain.safetensors", {"a": TABLE.astype(jnp.bfloat16)})
    np.testing.assert_array_equal(read_features(brain, 3), TABLE)


NAN = np.array([[0.0, 0.0], [0.0, np.nan], [np.inf, 0.0]])


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({"f": TABLE}, {"n_rows": 4}, "array 'f': expected 4 rows, one a row of the log, got 3"),
        ({"f": NAN}, {}, "array 'f': expected finite float32 numbers, got NaN or infinity for 2 rows"),
        ({"f": NAN}, {}, "rows of the log, first 1"),
        ({"f": np.full((3, 1), 1e300)}, {}, "got NaN or infinity for 3 rows of the log, first 0"),
        ({"f": np.array([["a"]])}, {}, "array 'f': expected numbers (rows, width), got <U1 of shape (1, 1)"),
        ({"f": TABLE[:, :0]}, {}, "array 'f': expected numbers (rows, width), got float32 of shape (3, 0)"),
        ({"f": ROWS}, {}, "expected an array (rows, width), got shapes {'f': (4,)}"),
        ({"f": ROWS}, {"array": "f"}, "array 'f': expected numbers (rows, width), got int32 of shape (4,)"),
        ({"headline": TABLE}, {"array": "headlin"}, "got 'headlin'; the nearest is 'headline'"),
        (
            {"headline": TABLE, "lede": TABLE},
            {"text_column": "headlines"},
            "or 'headlines' with 'headlines_row', got ['headline', 'lede']; the nearest is 'headline'",
        ),
        ({"f": TABLE, "f_row": ROWS}, {"n_rows": 3}, "array 'f_row': expected 3 rows, one a row of the log, got 4"),
        ({"f": TABLE, "f_row": ROWS + 1}, {"n_rows": 4}, "array 'f_row': row 0: expected 0 to 2, got 3"),
        ({"f": TABLE, "f_row": ROWS - 1}, {"n_rows": 4}, "array 'f_row': row 1: expected 0 to 2, got -1"),
        ({"f": TABLE, "f_row": ROWS * 0.5}, {"n_rows": 4}, "array 'f_row': expected integers (rows,), got float64"),
    ],
)
def test_wrong_files_are_named(tmp_path, arrays, arguments, message):
    path = write(tmp_path / "f.npz", arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_features(path, **{"n_rows": 3} | arguments)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files_that_cannot_be_read_are_named(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    with pytest.raises(FileNotFoundError, match=re.escape(f"found none at {path}")):
        read_features(path, 3)
    whole = write(path, {"f": TABLE}).read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(path, 3)
    with pytest.raises(ValueError, match=re.escape("ending in one of ('.npy', '.npz', '.safetensors'), got 'f.csv'")):
        read_features("f.csv", 3)


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "f.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(tmp_path / "f.npy", 1)


def test_the_cache_computes_once_a_key(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return TABLE * len(calls)

    folder = tmp_path / "deep" / "cache"
    np.testing.assert_array_equal(cached(folder, "log a / minilm", compute), TABLE)
    np.testing.assert_array_equal(cached(folder, "log a / minilm", compute), TABLE)
    np.testing.assert_array_equal(cached(folder, "log b / minilm", compute), TABLE * 2)
    assert len(calls) == 2
    assert sorted(path.suffix for path in folder.iterdir()) == [".npy", ".npy"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\x80\x04K\x01." + b, lambda b: b[:20]])
def test_a_damaged_cache_file_is_computed_anew_with_a_warning(tmp_path, caplog, damage):
    cached(tmp_path, "key", lambda: TABLE)
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(cached(tmp_path, "key", lambda: -TABLE), -TABLE)
    assert "damaged cache file" in caplog.text and path.name in caplog.text
    np.testing.assert_array_equal(cached(tmp_path, "key", lambda: TABLE), -TABLE)


def test_what_fails_leaves_no_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pickle"):
        cached(tmp_path, "key", lambda: np.array([{}], object))
    with pytest.raises(KeyError):
        cached(tmp_path, "key", lambda: {}["x"])

    def torn(self, target):
        raise OSError("disk gone")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", torn)
    with pytest.raises(OSError, match="disk gone"):
        cached(tmp_path, "key", lambda: TABLE)
    assert not list(tmp_path.iterdir())
