"""What the model itself says of tokens, to hold the packed computation against."""

import torch

from grpo_lightning.diagnostics.scoring import plain_logprobs, scored_batch
from grpo_lightning.loading import load_policy

PROMPT = tuple(range(3, 43))
SAMPLES = [(PROMPT, (50, 51, 52)), (PROMPT, (53,)), (PROMPT[:7], (54, 55, 56, 57, 58))]


def test_the_model_says_the_same_and_computes_logits_of_completions_alone(tiny_model):
    policy = load_policy(tiny_model, dtype="float32", lora_rank=4)
    batch = scored_batch(SAMPLES, 0.7, banned_token_ids=(60, 61))
    computed = []
    head = policy.causal_lm.get_output_embeddings()
    with torch.no_grad():
        packed = policy.token_logprobs(batch).logprobs
        with head.register_forward_hook(lambda module, inputs, logits: computed.append(logits.shape[1])):
            plain = plain_logprobs(policy, batch)
    assert plain.dtype is torch.float64
    torch.testing.assert_close(plain.float(), packed, atol=1e-5, rtol=0)
    assert computed == [len(completion) for _, completion in SAMPLES]
