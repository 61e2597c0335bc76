"""Our side of `bench/ppo.py`: one PPO iteration, repeated for every line on stdin; and the models of both sides.

python -m bench.ppo_ours FOLDER '{"precision": "bf16", "micro": 4}'
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf import iterate
from vqa_scratch.data.news import news
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl.mini_news import tokenizers_for
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, T5Policy, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.types import Prompt
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.precision import Precision


def prepare(folder: Path, *, batch: int, tokens: int, new: int, epochs: int, tiny: bool) -> None:
    """Weights and articles that both sides load."""
    torch.manual_seed(0)
    sizes = (T5Config(), BertConfig(layout="roberta", vocab_size=50265, max_positions=514, token_types=1, pad_id=1))
    if tiny:
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
        "queries": torch.randint(10, 32000, (batch, tokens)),
        "probe": torch.randint(10, 32000, (1, 12)),
        "judged": torch.randint(10, 50000, (2, 20)),
        "new_tokens": new,
        "epochs": epochs,
    }
    torch.save(task, folder / "task.pt")


def ours(folder: Path, options: dict) -> None:
    """The waiting process on our side."""
    keep_freed_memory()
    task = torch.load(folder / "task.pt", weights_only=True)
    batch, kind = len(task["queries"]), options.pop("precision", "fp32")
    micro = options.pop("micro", batch)
    options = RLHFOptions(
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
    precision = Precision(kind, torch.device("cpu"))
    policy = T5Policy(T5.from_pretrained(folder / "policy"))
    reference = freeze(T5Policy(T5.from_pretrained(folder / "policy")), precision.dtype)
    judges = [freeze(TextClassifier.from_pretrained(folder / name), precision.dtype) for name in ("grammar", "tone")]
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
    rules = SamplingRules(policy.eos_id, options.max_new_tokens)
    ppo = PPO(options, actor, reference, reward, prompts, rules, str, precision.autocast)
    take_turns(ppo)


def take_turns(ppo: PPO, first: Callable[[], object] = lambda: None) -> None:
    """An iteration for every line on stdin, before the first of them `first`; its figures go to stdout."""
    print("READY", flush=True)
    for _ in sys.stdin:
        if ppo.iteration == 0:
            first()
        start = time.perf_counter()
        log = iterate(ppo)
        count = ppo.options.prompts * ppo.options.samples
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


if __name__ == "__main__":
    ours(Path(sys.argv[1]), json.loads(sys.argv[2]))
