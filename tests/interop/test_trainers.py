"""Other projects' trainers, as they are published, learn from a store's stream what they learn from a tensor.

Needs the packages of requirements.txt (`make interop`); without them these tests fail.

How far apart may the losses be? The final FVU varies with the order of rows alone: over 24 seeds, the standard deviation
of FVU in one random order / FVU in another, from the same weights, is SPREAD. SEEDS runs are averaged, and four standard
deviations of that average are allowed. Over the same 24 seeds:

    FVU                     saelens         dictionary_learning   sparsify
    from the store          0.369           0.2113                0.168
    from a tensor           0.367           0.2116                0.168
    ratio - 1, its error    0.7 % +- 1.1    -0.1 % +- 0.2         0.3 % +- 0.5
    allowed                 11 %            2.4 %                 5.2 %
    rows unshuffled         + 26 %          + 4.2 %               + 6.0 %
    half of the rows        + 0.2 %         + 7.7 %               + 11 %
"""

import itertools
import json
import math

import pytest
import torch

import actcache
from tests.interop.peers import PEERS, make_saelens
from tests.interop.rows import BATCH, STEPS, fvu, make_rows, shuffled

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

SEEDS = 4
SPREAD = {"saelens": 0.055, "dictionary_learning": 0.012, "sparsify": 0.026}
LEARNT = {"saelens": 0.5, "dictionary_learning": 0.3, "sparsify": 0.3}
N_BATCHES = STEPS + 150  # of which some go into estimating norms


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("interop"))


@pytest.fixture(params=PEERS)
def peer(request) -> str:
    return request.param


def test_reaches_the_loss_of_rows_in_memory(rows, peer):
    logs = []
    for seed in range(SEEDS):
        with rows.stream(seed=seed) as stream:
            from_store = fvu(PEERS[peer]((batch.rows for batch in stream), seed), rows.heldout)
        from_tensor = fvu(PEERS[peer](shuffled(rows.train, seed), seed), rows.heldout)
        assert from_store < LEARNT[peer]
        logs.append(math.log(from_store / from_tensor))
    assert abs(sum(logs) / SEEDS) < 4 * SPREAD[peer] / math.sqrt(SEEDS), logs


def test_the_stream_is_as_good_as_a_list_of_its_batches(rows, peer):
    """Bit for bit: nothing a trainer does to its rows reaches rows that come later."""
    with rows.stream() as stream:
        batches = [batch.rows.clone() for batch in itertools.islice(stream, N_BATCHES)]
    with rows.stream() as stream:
        from_stream = PEERS[peer]((batch.rows for batch in stream), 0)
    from_list = PEERS[peer](iter(batches), 0)
    with torch.no_grad():
        assert torch.equal(from_stream(rows.heldout), from_list(rows.heldout))


def test_saelens_resumes_exactly(rows, tmp_path):
    """Its checkpoint and our cursor, saved together, lead to the weights of a run that never stopped."""

    def save_cursor(checkpoint_path):
        (checkpoint_path / "stream.json").write_text(json.dumps(stream.state_dict()))

    with rows.stream() as stream:
        trainer = make_saelens((batch.rows for batch in stream), 0, tmp_path, save_cursor)
        finished = trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    with rows.stream() as stream:
        stream.load_state_dict(json.loads((checkpoint / "stream.json").read_text()))
        trainer = make_saelens((batch.rows for batch in stream), 1)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        trainer.load_trainer_state(checkpoint)
        assert 0 < trainer.n_training_samples < STEPS * BATCH
        resumed = trainer.fit()
    for name, weights in finished.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


def test_an_endless_stream_keeps_the_batch_size(rows):
    """What peers assume: SAELens counts rows as steps times batch size."""
    store = actcache.open(rows.path)
    with store.stream(batch_size=1000, layers=[3], epochs=None, drop_last=True) as stream:
        assert {len(batch) for batch in itertools.islice(stream, 10)} == {1000}
