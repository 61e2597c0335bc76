"""The other side of `bench/ppo.py`: one PPO iteration of TRL 0.11.4, repeated whenever a line arrives on stdin.

Runs in its own environment (torch, trl==0.11.4, transformers==4.45.2) and imports nothing from this project.
`loop` follows the book: one article at a time through `generate` and the reward models, minibatches of one.
"""

import argparse
import json
import resource
import sys
import time

import torch
from torch.nn import functional as F


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--mode", choices=("batch", "loop"), default="batch")
    parser.add_argument("--beams", type=int, default=1)
    a = parser.parse_args()
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

    task = torch.load(f"{a.folder}/task.pt", weights_only=True)
    queries, new, epochs = task["queries"], task["new_tokens"], task["epochs"]
    batch = len(queries)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{a.folder}/tokenizer.json", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(f"{a.folder}/policy")
    reference = create_reference_model(model)
    one = a.mode == "loop"
    config = PPOConfig(
        batch_size=batch,
        mini_batch_size=1 if one else batch,
        gradient_accumulation_steps=batch if one else 1,
        ppo_epochs=epochs,
        learning_rate=1e-5,
        seed=0,
    )
    trainer = PPOTrainer(config, model, reference, tokenizer)
    judges = [
        AutoModelForSequenceClassification.from_pretrained(f"{a.folder}/{name}").eval() for name in ("grammar", "tone")
    ]
    options = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "top_p": 1.0, "num_beams": a.beams}
    options |= {"pad_token_id": 0, "eos_token_id": 1}

    def rewards_of(responses):
        rows = [torch.cat([torch.tensor([0]), 5 + r[1:] % 50000, torch.tensor([2])]) for r in responses]
        groups = [[row] for row in rows] if one else [rows]
        total = []
        with torch.no_grad():
            for group in groups:
                ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=1)
                logits = [judge(ids, (ids != 1).long()).logits for judge in judges]
                total.append(1.0 * logits[0][:, 1] + 0.5 * logits[1][:, 1])
        return list(torch.cat(total))

    def iteration():
        clock = [time.perf_counter()]
        if one:
            responses = [trainer.generate(q, **options).squeeze(0) for q in queries]
        else:
            responses = trainer.generate(list(queries), batch_size=batch, **options)
        clock.append(time.perf_counter())
        rewards = rewards_of(responses)
        clock.append(time.perf_counter())
        trainer.step(list(queries), list(responses), rewards)
        clock.append(time.perf_counter())
        return {
            "seconds": clock[-1] - clock[0],
            "generate": clock[1] - clock[0],
            "reward": clock[2] - clock[1],
            "update": clock[3] - clock[2],
            "responses": len(responses),
            "tokens": float(sum(len(r) - 1 for r in responses)),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    with torch.no_grad():
        # The same outputs as the other side for the same weights and tokens, before any training.
        model.eval()
        logits = model(input_ids=task["queries"][:1], decoder_input_ids=task["probe"])[0]
        grammar = judges[0](task["judged"]).logits
    torch.save({"logits": F.log_softmax(logits.float(), -1), "grammar": grammar}, f"{a.folder}/probe-trl.pt")
    print("READY", flush=True)
    for _ in sys.stdin:
        print("RESULT " + json.dumps(iteration()), flush=True)


if __name__ == "__main__":
    main()
