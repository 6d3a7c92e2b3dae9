"""Embeddings borrowed from a known model: which matrix, which rows, frozen, adapted, shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stackwise.config import ModelConfig, TokenizerEmbeddingConfig
from stackwise.model.decoder import Decoder
from stackwise.model.embedding_source import EmbeddingSource
from stackwise.model.embeddings import LexicalKernelManager
from stackwise.model.resolve import resolve_model_config


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.Tensor]:
    """A folder with a tiny GPT-2 (tied head) and its embedding matrix (29, 16)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = GPT2LMHeadModel(config)
    folder = str(tmp_path_factory.mktemp("gpt2"))
    model.save_pretrained(folder)
    return folder, model.transformer.wte.weight.detach()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A folder with a tiny sharded LLaMA, its embedding matrix and its own head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    folder = str(tmp_path_factory.mktemp("llama"))
    model.save_pretrained(folder, max_shard_size="3KB")
    assert (Path(folder) / "model.safetensors.index.json").is_file()
    return folder, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()


def test_matrix_of_a_tied_model(gpt2) -> None:
    folder, matrix = gpt2
    for option in ("embed_tokens", "lm_head"):
        with EmbeddingSource(folder, option) as source:
            assert (source.rows, source.width) == (29, 16)
            assert torch.equal(source.read(), matrix)


def test_option_chooses_the_matrix_of_a_sharded_model(llama) -> None:
    folder, embeddings, head = llama
    for option, expected in (("embed_tokens", embeddings), ("lm_head", head)):
        manager = LexicalKernelManager(folder, embedding_option=option)
        assert torch.equal(manager.token.weight, expected)
    assert not torch.equal(embeddings, head)


def test_manager_without_adapter_looks_rows_up(gpt2) -> None:
    folder, matrix = gpt2
    manager = LexicalKernelManager(folder)
    ids = torch.tensor([[3, 28], [0, 7]])
    assert manager.adapter is None
    assert torch.equal(manager(ids), matrix[ids])
    assert manager.token.weight.requires_grad is False
    assert LexicalKernelManager(folder, freeze_embeddings=False).token.weight.requires_grad


def test_adapter_bridges_the_widths_and_trains(gpt2) -> None:
    folder, matrix = gpt2
    manager = LexicalKernelManager(folder, 24, adapter_hidden_dim=20)
    ids = torch.tensor([1, 5])
    first, _, second = manager.adapter
    expected = second(torch.nn.functional.gelu(first(matrix[ids])))
    assert (first.out_features, second.out_features) == (20, 24)
    assert (manager(ids) - expected).abs().max() <= 1e-6
    manager(ids).sum().backward()
    assert manager.token.weight.grad is None
    assert first.weight.grad.abs().max() > 0


def test_rows_beyond_the_source_are_random_and_surplus_rows_are_left_out(gpt2) -> None:
    folder, matrix = gpt2
    larger = LexicalKernelManager(folder, vocab_size=31).token.weight
    assert torch.equal(larger[:29], matrix)
    assert larger[29:].abs().min() > 0
    assert not torch.equal(larger[29], larger[30])
    smaller = LexicalKernelManager(folder, vocab_size=20).token.weight
    assert torch.equal(smaller, matrix[:20])


def test_shared_head_is_the_matrix(gpt2) -> None:
    folder, matrix = gpt2
    manager = LexicalKernelManager(folder, freeze_embeddings=False)
    head = manager.build_head()
    assert head.weight is manager.token.weight
    x = torch.randn(3, 16)
    assert (head(x) - x @ matrix.T).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="a shared head needs equal widths"):
        LexicalKernelManager(folder, 24).build_head()


class TestDecoder:
    def build(self, folder: str, **fields: object) -> Decoder:
        source = TokenizerEmbeddingConfig(family=folder, freeze_embeddings=True)
        defaults = {
            "vocab_size": 30, "d_model": 24, "n_layers": 1, "n_heads": 2, "architecture": "gpt2",
            "tokenizer_embedding": source,
        }  # fmt: skip
        config = ModelConfig(**(defaults | fields))  # type: ignore[arg-type]
        return Decoder(resolve_model_config(config, seq_len=8))

    def test_width_is_read_from_the_source_and_adapted(self, gpt2) -> None:
        folder, matrix = gpt2
        model = self.build(folder)
        assert model.config.tokenizer_embedding.width == 16
        assert torch.equal(model.embeddings.token.weight[:29], matrix)
        assert model.pinned_parameters() == {"embeddings.token.weight"}
        assert model.embeddings.token.weight.requires_grad is False
        model(torch.randint(0, 30, (1, 6))).logits.sum().backward()
        assert model.embeddings.token.weight.grad is None
        assert model.embeddings.adapter[0].weight.grad.abs().max() > 0

    def test_equal_widths_can_be_tied(self, gpt2) -> None:
        folder, matrix = gpt2
        model = self.build(folder, d_model=16, tie_embeddings=True)
        assert model.head.weight is model.embeddings.token.weight
        assert torch.equal(model.head.weight[:29], matrix)

    def test_loading_weights_needs_no_source(self, gpt2, tmp_path) -> None:
        model = self.build(gpt2[0])
        model.config.tokenizer_embedding.family = str(tmp_path / "gone")
        again = Decoder(model.config, initialize=False)
        again.load_state_dict(model.state_dict())
        ids = torch.randint(0, 30, (1, 6))
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_unknown_sources_are_refused(tmp_path, gpt2) -> None:
    with pytest.raises(ValueError, match="embedding_option: got 'wte'"):
        EmbeddingSource(gpt2[0], "wte")
    with pytest.raises(ValueError, match="does not exist"):
        EmbeddingSource(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        EmbeddingSource(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        EmbeddingSource(str(tmp_path))


@pytest.mark.parametrize("family", ["gpt2", "mistral-7b", "someone/some-model"])
def test_without_a_network_the_message_says_what_to_do(family) -> None:
    with pytest.raises(ValueError, match=r"(?s)could not .*Without a network.*FOLDER"):
        LexicalKernelManager(family)
