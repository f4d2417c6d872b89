"""What a model loses, against whole forward passes with rows replaced by hand."""

import numpy as np
import pytest
import torch

from actcache.errors import UsageError
from actcache.model import Decoder
from actcache.patching import Patcher
from analysis.loss import Estimate, LossSums
from analysis.patched import add_batch, evaluate_patched
from analysis.subject import Subject
from tests.conftest import make_decoder
from tests.test_patching import CONFIGS, VOCAB, WIDTH
from tests.test_patching import by_hand as whole_pass
from tests.test_patching import make_decoder as family_decoder

ALL_TOKENS = 10**9


class Identity(Subject):
    """Gives back what it gets: rows are their own code."""

    def encode(self, rows, layer):
        assert layer in self.layers
        return rows

    def decode(self, code, layer):
        return code


class Nothing(Identity):
    """Gives zeros for what it gets."""

    def decode(self, code, layer):
        return torch.zeros_like(code)


def like(subject, kind):
    return kind(**{name: getattr(subject, name) for name in Subject.__dataclass_fields__})


@pytest.fixture(scope="module")
def found(subject, decoder):
    return {
        scores.positions: scores
        for scores in evaluate_patched(
            subject, Patcher(decoder), n_tokens=ALL_TOKENS, positions=("kept", "all")
        )
    }


class ByHand:
    """Every condition with whole forward passes, one sequence at a time, scores in float64."""

    def __init__(self, subject, decoder):
        self.subject, self.decoder, self.layers = subject, decoder, subject.layers
        self.n = subject.store.plan.grid.n_holdout_sequences
        self.mask = np.zeros((len(self.layers), self.n, 16), bool)
        for shard in subject.shards("holdout"):
            self.mask[:, shard.sequence, shard.position] = shard.passes
        stats = subject.store.stats("resid_post", "train")
        self.means = {layer: torch.from_numpy(found.mean).float() for layer, found in stats.items()}

    def stand_in(self, condition, layer, acts):
        if condition == "zero":
            return torch.zeros_like(acts)
        if condition == "mean":
            return self.means[layer].expand_as(acts)
        return self.subject.sae.decode(self.subject.sae.encode(acts[0]))[None]

    def logits(self, ids, condition, rows):
        handles = []
        for layer, at in rows.items():

            def edit(_module, _args, out, layer=layer, at=at):
                return torch.where(at[None, :, None], self.stand_in(condition, layer, out), out)

            handles.append(self.decoder.blocks[layer].register_forward_hook(edit))
        with torch.inference_mode():
            out = self.decoder.causal_lm(ids[None], use_cache=False).logits[0].double()
        for handle in handles:
            handle.remove()
        return out

    def scores(self, way, chosen):
        columns = {name: [] for name in ("clean", "sae", "zero", "mean", "kl", "mse")}
        for q in range(self.n):
            ids = torch.from_numpy(self.subject.store.tokens[q].astype(np.int64))
            mine = {layer: self.mask[self.layers.index(layer), q] for layer in chosen}
            at = np.all(list(mine.values()), 0)
            scored = np.flatnonzero(at[:-1] & at[1:])
            clean = self.logits(ids, "clean", {})
            logp = torch.log_softmax(clean, 1)
            columns["clean"] += (-logp[scored, ids[scored + 1]]).tolist()
            for condition in ("sae", "zero", "mean"):
                rows = {layer: torch.from_numpy(kept | (way == "all")) for layer, kept in mine.items()}
                patched = self.logits(ids, condition, rows)
                patched_logp = torch.log_softmax(patched, 1)
                columns[condition] += (-patched_logp[scored, ids[scored + 1]]).tolist()
                if condition == "sae":
                    columns["kl"] += (logp.exp() * (logp - patched_logp)).sum(1)[scored].tolist()
                    columns["mse"] += ((patched - clean) ** 2).mean(1)[scored].tolist()
        return {name: np.array(values) for name, values in columns.items()}


@pytest.fixture(scope="module")
def by_hand(subject, decoder):
    return ByHand(subject, decoder)


@pytest.mark.parametrize("way", ["kept", "all"])
@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 1)])
def test_equals_whole_forward_passes_with_rows_replaced_by_hand(found, by_hand, way, chosen):
    mine = found[way].together if len(chosen) == 2 else found[way].layers[chosen[0]]
    expected = by_hand.scores(way, chosen)
    mean = {name: values.mean() for name, values in expected.items()}
    assert mine.n_tokens == len(expected["clean"]) > 20
    for value, right in (
        (mine.loss, mean["clean"]),
        (mine.change, mean["sae"] - mean["clean"]),
        (mine.zero_change, mean["zero"] - mean["clean"]),
        (mine.mean_change, mean["mean"] - mean["clean"]),
        (mine.recovered_zero, (mean["zero"] - mean["sae"]) / (mean["zero"] - mean["clean"])),
        (mine.recovered_mean, (mean["mean"] - mean["sae"]) / (mean["mean"] - mean["clean"])),
        (mine.kl, mean["kl"]),
        (mine.logit_mse, mean["mse"]),
    ):
        assert value.value == pytest.approx(right, rel=2e-3, abs=2e-6)


def test_the_same_tokens_are_scored_whatever_is_patched(found):
    for layer in (0, 1):
        assert found["kept"].layers[layer].n_tokens == found["all"].layers[layer].n_tokens
        assert found["kept"].layers[layer].loss == found["all"].layers[layer].loss
    assert found["kept"].layers[0].n_tokens != found["kept"].together.n_tokens
    assert found["kept"].layers[0].zero_change != found["all"].layers[0].zero_change


def test_identity_changes_nothing_and_recovers_all(subject, decoder):
    for scores in evaluate_patched(like(subject, Identity), Patcher(decoder), n_tokens=ALL_TOKENS, positions=("kept", "all")):  # fmt: skip
        for mine in (*scores.layers.values(), scores.together):
            assert mine.change.value == mine.kl.value == mine.logit_mse.value == 0
            assert mine.change.se == mine.kl.se == 0
            assert mine.recovered_zero.value == mine.recovered_mean.value == 1
            assert mine.zero_change.value != 0


def test_zeros_for_reconstructions_are_the_ablation(subject, decoder):
    for scores in evaluate_patched(like(subject, Nothing), Patcher(decoder), n_tokens=ALL_TOKENS, positions=("kept", "all")):  # fmt: skip
        for mine in (*scores.layers.values(), scores.together):
            assert mine.change == mine.zero_change
            assert mine.kl == mine.zero_kl
            assert mine.kl.value > 0
            assert mine.recovered_zero.value == 0


class Stub:
    """What is patched at one hook of some layers: rows pass through `rule`."""

    def __init__(self, hook, layers, rule):
        self.target_hook, self.layers, self.rule = hook, layers, rule

    def edits(self, layer, patched):
        return {
            (self.target_hook, layer): lambda acts: torch.where(patched[..., None], self.rule(acts), acts)
        }


def assert_same(found: Estimate, expected: Estimate) -> None:
    """Sums of the same numbers, which a processor may add in another order."""
    assert (found.value, found.se) == pytest.approx((expected.value, expected.se), rel=1e-9)


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("family", CONFIGS)
def test_identity_zero_and_mean_in_every_family(family, hook, monkeypatch):
    """Of a subset of layers: giving back rows costs nothing, and giving zeros or means costs what the ablations cost."""
    patcher = Patcher(family_decoder(family, monkeypatch))
    generator = torch.Generator().manual_seed(3)
    layers = (0, 2)
    ids = torch.randint(0, VOCAB, (3, 10), generator=generator)
    mask = torch.rand(2, 3, 10, generator=generator) < 0.8
    means = {layer: torch.randn(WIDTH, generator=generator) for layer in layers}

    def scores(rule):
        sums = {"kept": {layer: LossSums() for layer in (*layers, None)}}
        add_batch(sums, Stub(hook, layers, rule), patcher, means, ids, mask, torch.arange(3))
        return {key: found.compute() for key, found in sums["kept"].items()}

    for mine in scores(torch.clone).values():
        assert mine.n_tokens > 0
        assert mine.change.value == mine.kl.value == mine.logit_mse.value == 0
        assert mine.zero_change.value != 0
    for mine in scores(torch.zeros_like).values():
        assert_same(mine.change, mine.zero_change)
        assert_same(mine.kl, mine.zero_kl)
        assert mine.recovered_zero.value == 0
    at_one = scores(lambda acts: means[2].expand_as(acts))
    assert_same(at_one[2].change, at_one[2].mean_change)
    assert at_one[0].change.value != pytest.approx(at_one[0].mean_change.value, rel=1e-6)

    def losses(edits):
        logp = torch.log_softmax(whole_pass(patcher.decoder, ids, edits).double(), 2)
        return -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]

    for key, chosen in ((0, [0]), (2, [1]), (None, [0, 1])):  # each of its own block, and at its own rows
        scored = mask[chosen].all(0)
        scored = scored[:, :-1] & scored[:, 1:]
        for name in ("zero", "mean"):
            edits = {}
            for i in chosen:
                value = means[layers[i]] if name == "mean" else torch.zeros(WIDTH)
                edits[hook, layers[i]] = lambda x, i=i, value=value: torch.where(mask[i][..., None], value, x)
            by_hand = (losses(edits) - losses({}))[scored].mean()
            assert getattr(at_one[key], f"{name}_change").value == pytest.approx(
                float(by_hand), rel=1e-4, abs=1e-6
            )


def test_how_many_sequences_run_at_once_changes_nothing(subject, decoder, found, monkeypatch):
    for name, value in (("_FORWARD_TOKENS", 16), ("_LOGIT_VALUES", 1000)):
        monkeypatch.setattr(f"analysis.patched.{name}", value)
    (scores,) = evaluate_patched(subject, Patcher(decoder), n_tokens=ALL_TOKENS)
    for layer in (0, 1):
        assert scores.layers[layer].n_tokens == found["kept"].layers[layer].n_tokens
        assert scores.layers[layer].kl.value == pytest.approx(found["kept"].layers[layer].kl.value, rel=1e-4)
        assert scores.layers[layer].change.se == pytest.approx(
            found["kept"].layers[layer].change.se, rel=1e-3
        )


def test_fewer_tokens_are_the_first_sequences(subject, decoder):
    done = []
    (scores,) = evaluate_patched(subject, Patcher(decoder), n_tokens=20, on_tokens=done.append)
    assert scores.together.n_sequences == 2
    assert scores.together.n_tokens <= sum(done) <= 30


def test_another_model_is_refused(subject):
    with pytest.raises(UsageError, match="other weights"):
        evaluate_patched(subject, Patcher(make_decoder(seed=1)), n_tokens=10)
    cut: Decoder = make_decoder()
    cut.cut(0)
    with pytest.raises(UsageError, match="was cut"):
        Patcher(cut)
