"""One PPO iteration, ours against TRL 0.11.4, in turn on the same machine, the same weights and the same articles.

    python -m venv trl_env && trl_env/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 rich
    python bench/ppo.py --trl trl_env/bin/python [--batch 8] [--repeats 5] [--out bench/ppo.json]

Random weights of the book's sizes (flan-t5-small, two roberta-base), articles of 400 tokens, 24 new tokens, 4 epochs.
Every contestant is a process of its own that waits; the driver lets them run one iteration each, round after round,
and reports medians. Before that it checks that both sides compute the same logits from the same files.

Without --trl only our own variants run against each other.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vqa_scratch.data.news import news  # noqa: E402
from vqa_scratch.engine.allocator import keep_freed_memory  # noqa: E402
from vqa_scratch.engine.precision import DTYPES, Precision  # noqa: E402
from vqa_scratch.models.bert import BertConfig  # noqa: E402
from vqa_scratch.models.classifier import TextClassifier  # noqa: E402
from vqa_scratch.models.t5 import T5, T5Config  # noqa: E402
from vqa_scratch.rl.config import RLHFConfig  # noqa: E402
from vqa_scratch.rl.mini_news import tokenizers_for  # noqa: E402
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, T5Policy, freeze  # noqa: E402
from vqa_scratch.rl.ppo import PPO  # noqa: E402
from vqa_scratch.rl.rewards import RewardPart, RewardSum  # noqa: E402
from vqa_scratch.rl.types import Prompt  # noqa: E402

# `micro` articles at once: about the same memory for each; it changes no result.
OURS = {
    "ours fp32": {"micro": 2},
    "ours bf16": {"precision": "bf16", "micro": 4},
    "ours bf16, frozen encoder": {"precision": "bf16", "freeze": "encoder", "micro": 8},
    "ours bf16, 4 samples an article": {"precision": "bf16", "samples": 4, "micro": 4},
}
TRL = {"TRL": ["--mode", "batch"], "TRL, one article at a time": ["--mode", "loop"]}


def prepare(folder: Path, a: argparse.Namespace) -> None:
    """Weights and articles that both sides load."""
    torch.manual_seed(0)
    sizes = (T5Config(), BertConfig(layout="roberta", vocab_size=50265, max_positions=514, token_types=1, pad_id=1))
    if a.tiny:
        small = {"dim": 32, "layers": 1, "heads": 2, "hidden": 32}
        sizes = (
            T5Config(dim=32, head_dim=8, hidden=32, encoder_layers=1, decoder_layers=1, heads=2),
            BertConfig(layout="roberta", vocab_size=50265, max_positions=514, token_types=1, pad_id=1, **small),
        )
    T5(sizes[0]).save_pretrained(folder / "policy")
    for name, classes in (("grammar", 2), ("tone", 3)):
        TextClassifier(sizes[1], tuple(f"LABEL_{i}" for i in range(classes))).save_pretrained(folder / name)
    tokenizers_for(news(100, 0))[0].save(folder)
    task = {
        "queries": torch.randint(10, 32000, (a.batch, a.tokens)),
        "probe": torch.randint(10, 32000, (1, 12)),
        "judged": torch.randint(10, 50000, (2, 20)),
        "new_tokens": a.new,
        "epochs": a.epochs,
    }
    torch.save(task, folder / "task.pt")


def ours(folder: Path, options: dict) -> None:
    """The waiting process on our side."""
    keep_freed_memory()
    task = torch.load(folder / "task.pt", weights_only=True)
    batch, kind = len(task["queries"]), options.pop("precision", "fp32")
    micro = options.pop("micro", batch)
    config = RLHFConfig(
        prompts=batch,
        micro_prompts=micro,
        max_new_tokens=task["new_tokens"],
        epochs=task["epochs"],
        iterations=1000,
        early_stop_kl=0.0,
        critic_warmup=0,
        scale_reward=False,
        missing_eos_penalty=0.0,
        **{"samples": 1} | options,
    )
    precision, dtype = Precision(kind, torch.device("cpu")), DTYPES[kind]
    policy = T5Policy(T5.from_pretrained(folder / "policy"))
    reference = freeze(T5Policy(T5.from_pretrained(folder / "policy")), dtype)
    judges = [freeze(TextClassifier.from_pretrained(folder / name), dtype) for name in ("grammar", "tone")]
    if kind == "fp32":
        with torch.no_grad():
            probe = policy.model(task["queries"][:1], None, task["probe"]).log_softmax(-1)
            torch.save({"logits": probe, "grammar": judges[0](task["judged"])}, folder / "probe-ours.pt")
    actor = ActorCritic(policy)

    def judge(model):
        def reward(samples):
            rows = [torch.tensor([0, *(5 + i % 50000 for i in ids), 2]) for ids in samples.ids]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
            with torch.no_grad():
                return model(ids, ids != 1)[:, 1].float()

        return reward

    reward = RewardSum([RewardPart("grammar", 1.0, judge(judges[0])), RewardPart("neutral", 0.5, judge(judges[1]))])
    prompts = [Prompt("", tuple(row)) for row in task["queries"].tolist()]
    rules = SamplingRules(policy.eos_id, config.max_new_tokens)
    ppo = PPO(config, actor, reference, reward, prompts, rules, str, precision.autocast)
    print("READY", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        log = ppo.step()
        count = config.prompts * config.samples
        result = {
            "seconds": time.perf_counter() - start,
            "generate": log["time/ppo/generate"],
            "reward": log["time/ppo/compute_rewards"],
            "score": log["time/ppo/forward_pass"],
            "update": log["time/ppo/optimize_step"],
            "responses": count,
            "tokens": log["tokens/responses_len_mean"] * count,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print("RESULT " + json.dumps(result), flush=True)


class Contestant:
    """A waiting process."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        self.read("READY")

    def read(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise SystemExit(self.process.stderr.read()[-3000:])

    def run(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.read("RESULT"))

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_comparable(folder: Path) -> float:
    """Largest difference between both sides' log-probabilities and reward logits. Raises AssertionError above 1e-3."""
    a, b = (torch.load(folder / f"probe-{side}.pt", weights_only=True) for side in ("ours", "trl"))
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert worst < 1e-3, f"the two sides compute different outputs: {worst}"
    return worst


def report(results: dict[str, list[dict]], out: Path | None, about: dict) -> None:
    """A table of medians and the factors that matter."""
    rows = {}
    for name, runs in results.items():
        rows[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows[name]["peak_mb"] = max(run["peak_mb"] for run in runs)
        rows[name]["samples_per_second"] = rows[name]["responses"] / rows[name]["seconds"]
    print(f"{'':34s} s/iteration  generate  update  samples/s  peak MB")
    for name, r in rows.items():
        print(
            f"{name:34s} {r['seconds']:11.2f} {r['generate']:9.2f} {r['update']:7.2f} "
            f"{r['samples_per_second']:10.3f} {r['peak_mb']:8.0f}"
        )
    for base in (name for name in ("TRL", "TRL, one article at a time", "ours bf16") if name in rows):
        for name in (n for n in rows if n.startswith("ours") and n != base):
            speed = rows[name]["samples_per_second"] / rows[base]["samples_per_second"]
            memory = rows[name]["peak_mb"] / rows[base]["peak_mb"]
            print(f"{name} against {base}: {speed:.2f} times the samples/s, {memory:.2f} of the peak memory")
    if out:
        out.write_text(json.dumps({"about": about, "medians": rows, "runs": results}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="python of an environment with trl==0.11.4 and transformers==4.45.2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro", type=int, help="our articles at once in the update, for all of ours")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="run only contestants whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the benchmark itself")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return ours(a.folder, json.loads(a.worker))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, a)
        contestants = {}
        for name, options in OURS.items():
            if a.only in name:
                worker = json.dumps(options | {"micro": min(a.micro or options["micro"], a.batch)})
                command = [sys.executable, __file__, "--worker", worker, "--folder", str(folder)]
                contestants[name] = Contestant(command)
        for name, options in TRL.items() if a.trl else ():
            if a.only in name:
                contestants[name] = Contestant([a.trl, str(ROOT / "bench" / "ppo_trl.py"), str(folder), *options])
        if a.trl and (folder / "probe-ours.pt").exists() and (folder / "probe-trl.pt").exists():
            print(f"both sides agree on log-probabilities and reward logits to {check_comparable(folder):.1e}")
        results: dict[str, list[dict]] = {name: [] for name in contestants}
        for round_ in range(a.repeats + 1):
            for name, contestant in contestants.items():
                result = contestant.run()
                if result["tokens"] < 0.95 * a.new * result["responses"]:
                    raise SystemExit(f"{name}: {result['tokens']} tokens; responses should run to the limit")
                if round_ > 0:  # the first round warms up
                    results[name].append(result)
                print(f"round {round_} {name}: {result['seconds']:.2f} s", file=sys.stderr, flush=True)
        for contestant in contestants.values():
            contestant.stop()
    about = {key: str(value) for key, value in vars(a).items() if key not in ("worker", "folder", "out")}
    report(results, a.out, about | {"threads": torch.get_num_threads(), "torch": torch.__version__})


if __name__ == "__main__":
    main()
