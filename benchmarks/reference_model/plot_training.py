"""Draw `train_log.jsonl` as loss and recall over tokens: training.png beside it."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=HERE / "train_log.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "training.png")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.log.read_text().splitlines()]
    tokens = [line["tokens"] / 1e6 for line in lines]
    with_text = [line for line in lines if line["text"] > 0]

    figure, (loss, recall) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    loss.plot([line["tokens"] / 1e6 for line in with_text], [line["text"] for line in with_text])
    loss.set_ylabel("training loss on text\n(nats per token)")
    recall.plot(tokens, [100 * line["value_right"] for line in lines], color="tab:green")
    recall.set_ylabel("answers right in\ntraining sequences (%)")
    recall.set_ylim(0, 103)
    recall.set_xlabel("tokens seen (millions)")
    for axes in (loss, recall):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    lengths = [line["length"] for line in lines]
    for i, length in enumerate(lengths):
        if i and length == lengths[i - 1]:
            continue
        start = tokens[i - 1] if i else 0.0
        loss.axvline(start, color="grey", lw=0.6)
        recall.axvline(start, color="grey", lw=0.6)
        top = loss.get_ylim()[1]
        loss.text(start, top, f" {length}", va="bottom", rotation=45, fontsize=8, color="grey")
    loss.set_title("sequence length in grey", fontsize=8, color="grey", loc="right", pad=26)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
