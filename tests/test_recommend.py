"""The recommendation example: its data, its measures, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recommend
from flax import nnx
from rec import data
from rec.data import Interactions, Questions
from rec.model import Recommender, Sizes, without_padding
from rich.console import Console

import sadsl as sa


@pytest.fixture(autouse=True)
def settings():
    """Promotion as users of the example have it; programs run once: no optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def write(path, text):
    path.write_text(text)
    return str(path)


CSV = """user, timestamp, item
ann, 3, tea
bob, 1, tea
ann, 1, milk
ann, 2, jam
ann, 3, rye
bob, 2, jam
carl, 1, tea
carl, 9.5, rye
carl, -2, milk
"""


def test_a_file_is_read_in_the_order_of_time(tmp_path):
    found = data.load(write(tmp_path / "a.csv", CSV))
    # Bob has two interactions only. Ann's tea and rye have one time: as in the file.
    names = {1: "milk", 2: "jam", 3: "tea", 4: "rye"}
    said = [[names[x] for x in items] for items in found.histories]
    assert said == [["milk", "jam", "tea", "rye"], ["milk", "tea", "rye"]]
    assert (found.num_items, found.mask, found.num_tokens) == (4, 5, 6)
    np.testing.assert_array_equal(found.popularity(), [0, 2, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\na,b\n", "no column 'timestamp'"),
        ("user,item,timestamp\na,b,noon\n", "line 2: timestamp 'noon' is no number"),
        ("user,item,timestamp\na,b,nan\n", "line 2: timestamp 'nan' is no number"),
        ("user,item,timestamp\na,b\n", "line 2: a cell is missing"),
        ("user,item,timestamp\na,b,1\na,c,2\n", "no user has 3 interactions"),
        ("", "no column 'user'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        data.load(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data=nowhere", "there is no such file"),
        ("--steps=0", "--steps=0 must be at least 1"),
        ("--mask_rate=0", "--mask_rate=0.0 must be in (0, 1]"),
        ("--learning_rate=0", "--learning_rate=0.0 must be above 0"),
        ("--num_heads=3", "must be a multiple of --num_heads=3"),
        ("--dropout=1", "--dropout=1.0 must be in [0, 1)"),
        ("--spec=windw(3)", "windw"),
        ("--spec=channel()", "padding can be hidden from maps"),
    ],
)
def test_bad_options_are_said_without_a_trace(capsys, flag, message):
    assert recommend.main([flag]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


# --- batches and questions ---


def users(*histories, num_items=9):
    made = tuple(np.array(items, np.int32) for items in histories)
    return Interactions("here", made, num_items)


def test_items_are_masked_in_the_training_part_only():
    there = users([1, 2, 3, 4, 5, 8, 9], [6, 7, 6, 8, 9])
    options = {"batch_size": 40, "length": 5, "mask_rate": 0.4, "last_rate": 0.2}
    found = data.cloze_batch(there, seed=1, step=2, **options)
    same = data.cloze_batch(there, seed=1, step=2, **options)
    jax.tree.map(np.testing.assert_array_equal, found, same)
    only_last = 0
    for tokens, places, targets in zip(*found, strict=True):
        whole = tokens.copy()
        whole[places[targets > 0]] = targets[targets > 0]
        # The last two items of each user are held out; padding stands before.
        assert whole.tolist() in ([1, 2, 3, 4, 5], [0, 0, 6, 7, 6])
        assert ((tokens == there.mask).sum()) == (targets > 0).sum() >= 1
        assert len(places) == 4
        only_last += (tokens[:-1] != there.mask).all()
    assert 5 < only_last < 35
    other = data.cloze_batch(there, seed=1, step=3, **options)
    assert (other.tokens != found.tokens).any()


def test_questions_leave_one_out():
    there = users([1, 2, 3, 4], [5, 6, 7, 8, 9])
    for held_out, wanted in ((1, [4, 9]), (2, [3, 8])):
        (asked,) = data.questions(there, held_out=held_out, batch_size=8, length=3)
        assert asked.wanted.tolist() == wanted
        rows = zip(asked.tokens, asked.seen, there.histories, strict=True)
        for tokens, seen, items in rows:
            known = items[: len(items) - held_out].tolist()
            assert seen.tolist() == known
            assert tokens.tolist() == [*known[-2:], there.mask]


def test_ranks_and_measures_by_hand():
    asked = Questions(
        np.zeros((3, 2), np.int32), np.array([4, 2, 3]),
        [np.array([1, 2]), np.array([2, 5]), np.array([1])],
    )  # fmt: skip
    scores = np.array(
        [
            # padding, items 1 to 5, mask: 1 and 2 are known, 3 is better, 5 is equal
            [9.0, 8.0, 7.0, 6.0, 5.0, 5.0, 9.0],
            # the wanted item was there before, and counts all the same
            [9.0, 1.0, 3.0, 2.0, 1.0, 9.0, 9.0],
            [9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 9.0],
        ]
    )
    ranks = data.ranks(scores, asked, 5)
    assert ranks.tolist() == [2, 0, 3]
    found = recommend.score(np.array([2, 0, 3, 10]))
    assert found.hit_rate == 0.75
    gain = 1 / np.log2(4) + 1 + 1 / np.log2(5)
    assert found.ndcg == pytest.approx(gain / 4)
    assert found.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_generated_users_follow_their_series():
    made = data.Made(num_users=40, num_series=8, length=5, noise=0.0, fewest=3, most=20)
    found = made.draw(3)
    assert found.num_items == 40
    sizes = [len(x) for x in found.histories]
    assert 3 <= min(sizes) < max(sizes) <= 20
    again = made.draw(3)
    assert all(map(np.array_equal, found.histories, again.histories))
    for items in found.histories:
        series, place = np.divmod(items - 1, 5)
        for each in np.unique(series):
            # A series goes on by one, or starts anew when it comes back.
            steps = np.diff(place[series == each])
            assert set(steps) <= {1, -4}


# --- the model ---


def test_padding_is_hidden_from_every_kind_of_spec():
    ids = sa.segments()
    assert without_padding(sa.full()) == ids
    assert without_padding(sa.window(2, 2)) == sa.window(2, 2) & ids
    assert without_padding(sa.linear(map=sa.full())) == sa.linear(map=ids)
    both = sa.gated(sa.softmax(sa.window(2, 2), sink="s"), sa.linear(map=sa.full()))
    hidden = sa.gated(sa.softmax(sa.window(2, 2) & ids, sink="s"), sa.linear(map=ids))
    assert without_padding(both) == hidden


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["full()", "window(2, 2)", "linear(map=full())"])
def test_padding_does_not_matter(spec):
    """A longer model with the places of a shorter one gives the same states."""
    sizes = Sizes(num_layers=1, d_model=8, length=9, impl="reference")
    model = Recommender(sizes, sa.parse(spec), 12, nnx.Rngs(0))
    tokens = jnp.array([[0, 0, 0, 0, 3, 4, 11, 5, 11]])
    whole = jax.jit(lambda x: model.encoded(x))(tokens)
    model.places.embedding[...] = model.places.embedding[...].at[:4].set(7.0)
    model.items.embedding[...] = model.items.embedding[...].at[0].set(-5.0)
    other = jax.jit(lambda x: model.encoded(x))(tokens)
    np.testing.assert_allclose(other[:, 4:], whole[:, 4:], atol=1e-5)
    assert float(abs(other[:, :4] - whole[:, :4]).max()) > 0.1


QUICK = [(["full()"], []), (["full()", "window(2, 2)"], [pytest.mark.slow])]


@pytest.mark.parametrize("specs", [pytest.param(x, marks=m) for x, m in QUICK])
def test_quick_run(capsys, specs):
    flags = [f"--spec={spec}" for spec in specs]
    assert recommend.main(["--quick", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if "NDCG@10" in line)
    _, _, *rows = lines[head : head + 3 + len(specs)]
    assert [row.split("  ")[0] for row in rows] == ["popularity", *specs]
    assert len({len(row.rstrip()) for row in rows[1:]}) == 1


@pytest.mark.slow
def test_it_learns_what_comes_next():
    """On generated users every spec is far above popularity, and above chance."""
    jax.config.update("jax_disable_most_optimizations", False)
    arguments = ["--steps=500", "--spec=window(4, 4)"]
    rows = recommend.recommend(recommend.options(arguments), Console())
    popular, *models = (row.test.hit_rate for row in rows)
    assert popular < 0.1
    assert min(models) > 0.25
