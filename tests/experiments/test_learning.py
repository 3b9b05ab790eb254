"""Comparisons of drafters, objectives and traffic on a tiny model: equal footing, and what they write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import yaml

from dvi_jax.config import ObjectiveConfig, load_train_config
from dvi_jax.data.prompts import HELD_OUT_SALT, is_held_out
from dvi_jax.decode.batch import Generation
from dvi_jax.errors import UserError
from dvi_jax.importing.cache import open_checkpoint
from dvi_jax.learn.fast_update import _fast_update
from dvi_jax.learn.new_drafter import with_new_drafter
from dvi_jax.learn.packing import Packed
from dvi_jax.learn.schedule import kl_to_rl
from dvi_jax.loading import from_checkpoint, trained_parts
from dvi_jax.presets import TINY
from dvi_jax.trained_parts import write_drafter
from experiments import distill_curve, domain_shift, drafters, draw, learning_cost, objectives, sweep
from experiments.learning_cost import Stretch


@pytest.fixture
def distill_config(byte_checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 258, (40, 32)).astype(np.uint16)
    Packed(tokens, np.ones(tokens.shape, bool)).save(tmp_path / "text.npz")
    settings = {
        "trainer": "distill",
        "checkpoint": str(byte_checkpoint),
        "out": "never",
        "data": [str(tmp_path / "text.npz")],
        "tokens": 1024,
        "row_length": 32,
        "batch_rows": 4,
        "eval_rows": 4,
        "log_every": 2,
        "unroll_steps": 1,
        "warmup": 2,
    }
    path = tmp_path / "distill.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.full
def test_drafters(distill_config, conversations, tmp_path, capsys):
    out = tmp_path / "out"
    grid = ["--runs", "exit_head:1:2", "--decode", "all", "--data", str(conversations)]
    sizes = ["--prompts", "3", "--draft-steps", "2", "--new-tokens", "8"]
    assert drafters.main(["--config", str(distill_config), "--out", str(out), *grid, *sizes]) == 0
    (run,) = json.loads((out / "drafters.json").read_text(encoding="utf-8"))["runs"].values()
    assert run["tokens"] == [256, 512, 768, 1024]
    # lora_S of rank 2 on the four matrices of layer 0 (rank * (inputs + outputs) each), and the head: lora_S of rank 64
    # on the hidden state, norm, scale.
    d, f, heads = TINY.hidden_size, TINY.intermediate_size, TINY.num_heads * TINY.head_dim
    qkv = heads + 2 * TINY.num_kv_heads * TINY.head_dim
    assert run["parameters"] == 2 * (d + qkv + heads + d + d + 2 * f + f + d) + 64 * 2 * d + d + 1
    assert run["decoded"]["identical"] == run["decoded"]["prompts"] == 3
    assert {"drafters_curves.png", "drafters_layers.png"} <= {path.name for path in out.iterdir()}
    assert "3 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["fused", "unknown:2", "fused:two", "fused:1:2:3"])
def test_what_is_no_run(text):
    with pytest.raises(UserError, match=r"DRAFTER:EXIT_LAYER\[:RANK\]"):
        drafters.Spec.parse(text)


def test_the_compared_objectives():
    """The weights that each objective ends with: (KL, policy, cross-entropy)."""
    base = ObjectiveConfig(warmup=10, ramp=10, kl_min=0.05, pg_max=0.8, ce_weight=0.1)
    ends = {
        name: (*map(float, kl_to_rl(jnp.int32(1000), objective)), objective.ce_weight)
        for name, objective in objectives.variants(base).items()
    }
    assert ends == {
        "KL only": (1.0, 0.0, 0.0),
        "RL only": (0.0, pytest.approx(0.8), 0.0),
        "CE only": (0.0, 0.0, 1.0),
        "KL -> RL": (pytest.approx(0.05), pytest.approx(0.8), 0.1),
    }


@pytest.mark.full
def test_objectives_see_the_same_tokens(write_config, tmp_path, monkeypatch):
    """Two seeds of two objectives; a seed compiles nothing that the other did not."""

    def two(base: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
        return {"KL -> RL": base, "CE only": replace(base, kl_max=0.0, kl_min=0.0, pg_max=0.0, ce_weight=1.0)}

    monkeypatch.setattr(objectives, "variants", two)
    compiled = _fast_update._cache_size()
    config = write_config(prompts=8, eval_every=2)
    assert objectives.main(["--config", str(config), "--seeds", "2", "--out", str(tmp_path / "out")]) == 0
    assert _fast_update._cache_size() - compiled <= 2
    runs = json.loads((tmp_path / "out" / "objectives.json").read_text(encoding="utf-8"))["runs"]
    every = [run for seeds in runs.values() for run in seeds]
    assert len(every) == 4
    assert len({run["new_tokens"] for run in every}) == 1
    assert all(run["prompts"] == [0, 4, 8] for run in every)
    assert all(run["updates"] == 8 for run in every)
    assert (tmp_path / "out" / "objectives.png").exists()


def write_domains(folder: Path, *names: str, topics: tuple[str, ...]) -> dict:
    """The data settings of a run over files of 8 questions to learn from and 2 held-out ones each, on a topic each."""
    for name, topic in zip(names, topics, strict=True):
        questions = [f"{topic} {index}?" for index in range(200)]
        apart = [is_held_out(question, 0.1, HELD_OUT_SALT) for question in questions]
        chosen = [q for q, held in zip(questions, apart, strict=True) if held][:2]
        chosen += [q for q, held in zip(questions, apart, strict=True) if not held][:8]
        records = [
            {"id": index, "messages": [{"role": "user", "content": question}]} for index, question in enumerate(chosen)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    files = [str(folder / f"{name}.jsonl") for name in names]
    return {"files": files, "max_prompt_tokens": 48, "held_out_fraction": 0.1, "held_out_prompts": 4}


@pytest.mark.full
def test_domain_shift(byte_checkpoint, write_config, tmp_path, capsys):
    """From a kept drafter. The stretches for the cost write the very same, and the picture is drawn again.

    An update follows every other rollout.
    """
    new = with_new_drafter(open_checkpoint(byte_checkpoint), "exit_head", {"rank": 4, "alpha": 4}, 1)
    write_drafter(tmp_path / "kept", replace(new, **trained_parts(from_checkpoint(new).params)))
    data = write_domains(tmp_path, "chat", "code", topics=("chat", "code"))
    config, out = write_config(prompts=16, update_every=2, data=data), tmp_path / "out"
    sizes = [
        "--per-domain",
        "8",
        "--seeds",
        "1",
        "--cost-prompts",
        "8",
        "--cost-pairs",
        "2",
        "--drafter-from",
        str(tmp_path / "kept"),
    ]
    assert domain_shift.main(["--config", str(config), "--out", str(out), *sizes]) == 0
    result = json.loads((out / "domain_shift.json").read_text(encoding="utf-8"))
    cost = result["cost"]
    assert cost["same_output"]
    assert (cost["rollouts"], cost["updates"], len(cost["shares"])) == (4, 4, 2)
    assert cost["update_seconds"][1] > cost["update_seconds"][0]
    frozen, (online,) = result["frozen"], result["online"]
    for name in ("rollout_seconds", "update_seconds"):
        assert len(online[name]) == 8
        assert min(online[name]) > 0
    assert frozen["prompts"] == online["prompts"] == list(range(2, 18, 2))
    assert frozen["new_tokens"] == online["new_tokens"]
    assert set(result["summary"]) == {"chat", "code"}
    assert "learning costs" in capsys.readouterr().out
    assert result["settings"]["data"]["files"] == ["chat.jsonl", "code.jsonl"]
    assert result["settings"]["checkpoint"] == "kept"
    assert str(tmp_path) not in json.dumps(result)
    (out / "domain_shift.png").unlink()
    assert draw.main([str(out / "domain_shift.json")]) == 0
    assert (out / "domain_shift.png").exists()


@pytest.mark.parametrize(
    ("topics", "prompts", "message"),
    [
        (("same", "same"), 16, r"chat.jsonl 8, code.jsonl 0 .*duplicate id: 10"),
        (("a", "b"), 15, r"prompts is 15: 2 files of 8 prompts need as many"),
    ],
)
def test_traffic_that_does_not_change_where_it_should(write_config, tmp_path, topics, prompts, message):
    """Found before anything is trained: no result is begun."""
    config = write_config(prompts=prompts, data=write_domains(tmp_path, "chat", "code", topics=topics))
    with pytest.raises(UserError, match=message):
        domain_shift.main(["--config", str(config), "--out", str(tmp_path / "out"), "--per-domain", "8"])
    assert not (tmp_path / "out").exists()


def test_second_halves_of_the_domains():
    """Domain b is prompts 9 to 16; its second half, rollouts of 13-14 and 15-16, which two seeds decoded."""

    def of(*rates: float) -> domain_shift.Run:
        return {"prompts": list(range(2, 18, 2)), "accept_rate": [0.0] * 6 + list(rates)}

    online = [of(0.3, 0.5), of(0.5, 0.5)]
    found = domain_shift.compare(of(0.2, 0.6), online, ["a", "b"], 8)
    assert found["a"] == {"frozen": 0, "online": [0, 0], "change": 0, "error": 0}
    # Over the seeds, the first rollout gained 0.2 and the second lost 0.1: 0.05 on average, and half of 0.3 by chance.
    assert (found["b"]["frozen"], *found["b"]["online"]) == pytest.approx((0.4, 0.4, 0.5))
    assert (found["b"]["change"], found["b"]["error"]) == pytest.approx((0.05, 0.15))
    with pytest.raises(UserError, match="no rollout in the second half of c"):
        domain_shift.compare(of(0.2, 0.6), online, ["a", "b", "c"], 8)


def test_the_cost_of_learning_is_the_median_over_pairs():
    """Five pairs that drift: rates by hand. One stretch that wrote something else is noticed."""

    def pair(off: float, on: float) -> tuple[Stretch, Stretch]:
        return Stretch(off, 100, "a", off, 0.0), Stretch(on, 100, "a", off, on - off)

    pairs = [pair(10, 11), pair(20, 25), pair(8, 10), pair(10, 10), pair(5, 8)]
    found = learning_cost.summarise(pairs)
    assert found["shares"] == pytest.approx([1 / 11, 1 / 5, 1 / 5, 0, 3 / 8])
    assert (found["share"], found["off"], found["on"]) == pytest.approx((1 / 5, 10, 10))
    assert (found["rollout_seconds"], found["update_seconds"]) == ([10, 10], [0, 2])
    assert found["same_output"]
    odd = replace(pairs[2][1], digest="b")
    assert not learning_cost.summarise([*pairs, (pairs[0][0], odd)])["same_output"]


def test_a_cost_needs_updates(write_config):
    config = load_train_config(write_config(updates_per_rollout=0))
    with pytest.raises(UserError, match="updates_per_rollout is 0"):
        learning_cost.cost_of_learning(config, prompts=8, pairs=1)
    config = load_train_config(write_config(update_every=4))
    with pytest.raises(UserError, match="an update follows 8 prompts"):
        learning_cost.cost_of_learning(config, prompts=7, pairs=1)


@pytest.mark.full
def test_sweep_over_every_prompt_of_a_file(byte_checkpoint, tmp_path):
    """By kind of prompt; the one that is too long is left out, a dialogue ends with its last question."""
    turns = [("a-0", ["Why?"]), ("a-1", ["How?"]), ("b-0", ["Who?", "I", "Me?"]), ("b-1", ["x" * 90])]
    lines = [
        json.dumps(
            {
                "id": name,
                "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)],
            }
        )
        for name, texts in turns
    ]
    (tmp_path / "held.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out" / "sweep.json"
    arguments = ["--checkpoint", str(byte_checkpoint), "--data", str(tmp_path / "held.jsonl"), "--all"]
    sizes = ["--max-prompt-tokens", "48", "--new-tokens", "8", "--draft-steps", "2", "--thresholds", "0"]
    assert sweep.main([*arguments, *sizes, "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["prompts"] == 3
    (row,) = result["rows"]
    assert row["identical"] == 3
    assert set(row["tokens_per_round_by_kind"]) == {"a", "b"}
    assert all(1 <= mean <= 3 for mean in row["tokens_per_round_by_kind"].values())
    assert out.with_suffix(".png").exists()


def test_sweep_compares_seconds_of_equal_tokens_and_rates_of_others():
    """12 tokens: 4 s plainly and 2 s with drafts; the fastest plain wrote 10 in 2.5 s."""

    def decoded(lengths: list[int], drafted: list[int], seconds: float) -> dict:
        new = list(range(sum(lengths)))
        generation = Generation(new, new, lengths, drafted, "length")
        return {"generations": [generation], "seconds": seconds, "tokens_per_second": sum(lengths) / seconds}

    plain, fastest = decoded([1] * 12, [0] * 12, 4.0), decoded([1] * 10, [0] * 10, 2.5)
    row = sweep.compare(plain, fastest, decoded([3] * 4, [3] * 4, 2.0))
    assert row["speedup"] == 2.0
    assert row["fastest_plain_tokens_per_second"] == 4.0
    assert row["speedup_over_fastest"] == 1.5
    assert row["identical"] == 1


def test_distill_curve(tmp_path, capsys):
    """130 updates in groups of 3, means by hand; the first update, which counts compilation, is not timed."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records = [{"kind": "eval", "step": 0, "agreement": [0.0, 0.0]}]
    for step in range(1, 131):
        rate = 1.0 if step == 1 else 100.0
        values = {"tokens": 10 * step, "tokens_per_second": rate, "agreement": [step / 1000, 0.1], "loss": 200 - step}
        records.append({"kind": "train", "step": step, **values})
    records.append({"kind": "eval", "step": 130, "agreement": [0.5, 0.25]})
    first.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    second.write_text("\n".join(map(json.dumps, [*records[:3], records[-1]])), encoding="utf-8")
    out = tmp_path / "curve" / "distill.json"
    stages = [f"text={first}", f"both={second}"]
    assert distill_curve.main([*stages, "--seen", "both", "--out", str(out)]) == 0
    text, both = json.loads(out.read_text(encoding="utf-8"))["stages"]
    assert text["tokens"] == [*range(30, 1300, 30), 1300]
    assert text["agreement"][0] == [pytest.approx(0.002), pytest.approx(0.1)]
    assert text["loss"][0] == 198
    assert text["held_out"] == [[0.0, 0.0], [0.5, 0.25]]
    assert text["tokens_per_second"] == 100
    assert (text["seen"], both["seen"]) == (False, True)
    assert out.with_suffix(".png").exists()
    assert "both: 0.0M tokens, 100 tokens/s, held-out agreement 0.000 -> 0.500 (rows learned from)" in (
        capsys.readouterr().out
    )
    first.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"a.jsonl is not the metrics.jsonl of a finished distillation"):
        distill_curve.main([*stages, "--out", str(out)])


RESULTS = Path(sweep.__file__).parent / "results"


@pytest.mark.parametrize("name", ["spec_bench", "sweep", "objectives", "distill"])
def test_kept_results_can_be_drawn(name, tmp_path):
    source = RESULTS / f"{name}_smollm2_h100.json"
    assert source.with_suffix(".png").exists()
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    assert draw.main([str(copy)]) == 0
    assert matplotlib.image.imread(copy.with_suffix(".png")).std() > 0.01  # not blank


def test_what_cannot_be_drawn(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": [{"shape": "7b"}]}', encoding="utf-8")
    with pytest.raises(UserError, match="holds no result with a picture"):
        draw.main([str(tmp_path / "other.json")])


@pytest.mark.parametrize("path", sorted((Path(sweep.__file__).parent / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_read(path):
    assert load_train_config(path).out


def test_the_two_ablations_differ_in_their_text_alone():
    configs = Path(sweep.__file__).parent / "configs"
    text, replies = (load_train_config(configs / f"ablation_{name}.yaml") for name in ("text", "replies"))
    assert text.data != replies.data
    assert replace(text, out="o", data=()) == replace(replies, out="o", data=())


@pytest.mark.parametrize("count", ["0", "-1", "many"])
@pytest.mark.parametrize("command", [objectives, domain_shift])
def test_counts_are_checked_before_anything_runs(command, count):
    with pytest.raises(UserError, match=f"--seeds: expected a number of 1 or more, got '{count}'"):
        command.main(["--config", "none.yaml", "--out", "none", "--per-domain", "8", "--seeds", count])
