"""The learning curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from dvi_jax.errors import UserError
from dvi_jax.learn.metrics import read_records


def plot_learning_curve(metrics: str | Path, picture: str | Path) -> None:
    """Draw a run's metrics.jsonl: accept rate (rollouts and held out) above, loss terms below, over updates."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the learning curve needs matplotlib: pip install 'dvi_jax[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_records(Path(metrics))
    rollouts = [record for record in records if record["kind"] == "train"]
    updates = [record for record in rollouts if "kl" in record]  # the others had no update of their own
    evaluations = [record for record in records if record["kind"] == "eval"]
    steps = [record["step"] for record in updates]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), constrained_layout=True)
    top.plot(
        [r["step"] for r in rollouts],
        [100 * r["accept_rate"] for r in rollouts],
        color="0.75",
        linewidth=1,
        label="rollouts",
    )
    top.plot(
        [r["step"] for r in evaluations],
        [100 * r["accept_rate"] for r in evaluations],
        marker="o",
        label="held-out prompts",
    )
    top.set_ylabel("accepted / judged drafts (%)")
    top.set_ylim(bottom=0)
    top.legend(loc="lower right")
    bottom.plot(steps, [r["kl"] for r in updates], label="KL(verifier || drafter), nats")
    bottom.plot(steps, [r["pg"] for r in updates], label="policy-gradient term")
    bottom.set_ylabel("loss terms")
    bottom.set_xlabel("fast updates")
    bottom.legend(loc="upper right")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
