"""Llama against transformers' LlamaForCausalLM with the same weights: logits, loss, every gradient."""

import pytest
import torch
import torch.nn.functional as F

from llama.model import ModelConfig, build_model

transformers = pytest.importorskip("transformers")
from transformers.models.llama import modeling_llama  # noqa: E402

SHAPES = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "head_52": {"hidden_size": 208},
    "head_48": {"hidden_size": 192},
    "theta_5e5": {"rope_theta": 5e5},
}


def shape(name):
    common = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2}
    return ModelConfig(**{**common, "num_attention_heads": 4, **SHAPES[name]})


def hugging_face(cfg, model):
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    )
    values = {key: getattr(cfg, key) for key in f"{keys} rms_norm_eps tie_word_embeddings".split()}
    rope = {"rope_theta": cfg.rope_theta, "rope_type": "default"}
    config = transformers.LlamaConfig(**values, rope_parameters=rope, attn_implementation="sdpa")
    hf = transformers.LlamaForCausalLM(config).to(model.head_weight.dtype)
    state = dict(model.state_dict())
    if cfg.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    hf.load_state_dict(state, strict=True)
    return hf


def batch(cfg):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(cfg.vocab_size, (3, 17), generator=g)
    y = torch.randint(cfg.vocab_size, (3, 17), generator=g)
    y[0, 5:9] = y[2, -4:] = -100
    return x, y


def grow(model):
    """Weights of trained size and gains other than 1: from 0.02 and 1 the blocks hardly reach the logits."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6.0) if p.ndim > 1 else p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))


def assert_close(ours, theirs, rtol, name):
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= rtol, f"{name}: relative error {error:.2e}"


def compare(cfg, dtype, rtol):
    model = build_model(cfg, "cpu", dtype, seed=3)
    grow(model)
    hf = hugging_face(cfg, model)
    x, y = batch(cfg)
    assert_close(model(x), hf(input_ids=x).logits, rtol, "logits")
    ours = model(x, y)
    theirs = hf(input_ids=x, labels=y, shift_labels=y, num_items_in_batch=1).loss
    assert ours.dtype == dtype
    assert_close(ours, theirs, rtol, "loss")
    ours.backward()
    theirs.backward()
    expected = dict(hf.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(expected)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name].grad, rtol, name)


@pytest.mark.parametrize("name", SHAPES)
def test_fp32_equals_transformers(name):
    compare(shape(name), torch.float32, 1e-5)


# transformers computes three things in fp32 whatever the weights are. For float64 each is replaced by
# the same formula without the cast: the norm, the rotary tables, the loss.
def norm_float64(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def rotary_float64(self, x, position_ids):
    dim = self.config.head_dim
    powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angle = position_ids[..., None].double() / self.config.rope_parameters["rope_theta"] ** powers
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def loss_float64(logits, labels, vocab_size, **_):
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), reduction="sum")


@pytest.mark.parametrize("name", SHAPES)
def test_float64_equals_transformers(name, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm_float64)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary_float64)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "loss_function", staticmethod(loss_float64))
    compare(shape(name), torch.float64, 1e-10)


def test_bf16_is_as_close_to_the_exact_logits_as_transformers():
    cfg = shape("gqa")
    model = build_model(cfg, "cpu", torch.float32, seed=3)
    grow(model)
    model = model.bfloat16()
    hf, (x, _) = hugging_face(cfg, model), batch(cfg)
    ours, theirs = model(x).float(), hf(input_ids=x).logits.float()
    exact = model.float()(x)
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()
