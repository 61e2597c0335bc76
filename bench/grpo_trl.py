"""The other side of `bench/grpo.py`: a step of TRL's GRPO or RLOO trainer whenever a line arrives on stdin.

Runs in its own environment (torch, trl, transformers) and imports nothing from this project. The first step leaves its
responses, and what TRL makes of them, for the other side to be compared with.
"""

import json
import os
import resource
import sys
import time

import torch


def main():
    folder, algorithm, recompute = sys.argv[1:4]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    task = torch.load(f"{folder}/task.pt", weights_only=True)
    end, count = f"t{task['eos']}", len(task["prompts"]) * task["samples"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token=end, pad_token=end)
    texts = [" ".join(f"t{index}" for index in row) for row in task["prompts"].tolist()]
    seen = {}

    def even(prompts, completions, completion_ids, **_):
        seen["tokens"] = sum(map(len, completion_ids))
        rewards = [sum(index % 2 == 0 for index in ids) / len(ids) for ids in completion_ids]
        seen["rewards"] = torch.tensor(rewards)
        return rewards

    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[algorithm]
    config = config_class(
        output_dir=f"{folder}/trl-{algorithm}",
        per_device_train_batch_size=count,
        num_generations=task["samples"],
        max_completion_length=task["new"],
        beta=task["beta"],
        learning_rate=1e-5,
        max_grad_norm=1e9,  # so that the norm that is compared is that of the whole gradient
        max_steps=1000,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=recompute == "recompute",
        disable_dropout=True,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            print("READY", flush=True)

        def on_step_begin(self, *args, **kwargs):
            if not sys.stdin.readline():
                os._exit(0)
            seen["start"] = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0 and recompute != "recompute":
                probe = seen["probe"] | {"loss": seen["loss"], "rewards": seen["rewards"]}
                probe["gradient"] = torch.nn.utils.get_total_norm(
                    [p.grad for p in model.parameters() if p.grad is not None]
                )
                torch.save(probe, f"{folder}/probe-{algorithm}-trl.pt")
            seen.pop("probe", None)

        def on_step_end(self, *args, **kwargs):
            result = {
                "seconds": time.perf_counter() - seen["start"],
                "generate": seen["generate"],
                "responses": count,
                "tokens": float(seen["tokens"]),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
            print("RESULT " + json.dumps(result), flush=True)

    class Watched(trainer_class):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            made = super()._generate(*args, **kwargs)
            seen["generate"] = time.perf_counter() - start
            return made

        def _generate_and_score_completions(self, *args, **kwargs):
            made = super()._generate_and_score_completions(*args, **kwargs)
            seen["probe"] = {"ids": made["completion_ids"], "mask": made["completion_mask"]}
            # The reference is the policy in the first step; RLOO keeps only the sums of its log-probabilities.
            logprobs = made.get("ref_per_token_logps")
            seen["probe"]["logprobs"] = made["old_logps"] if logprobs is None else logprobs
            seen["probe"]["advantages"] = made["advantages"]
            return made

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["loss"] = loss.detach()
            return loss

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32)
    data = Dataset.from_dict({"prompt": texts * 1000})
    Watched(
        model=model,
        reward_funcs=even,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Turns()],
    ).train()


if __name__ == "__main__":
    main()
