"""The text encoder against transformers' own forward and the released networks' arithmetic."""
import pytest
import torch
from transformers import BertConfig, BertModel

from ris_nb.contract import RISError
from ris_nb.encoders.language import TextEncoder, additive_mask

SIZES = dict(vocab_size=97, width=48, layers=3, heads=4, ffn=96, max_positions=32)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = TextEncoder(**SIZES).eval()
    with torch.no_grad():  # BERT's own 0.02 would hide mistakes
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return encoder


def sentences():
    ids = torch.randint(5, 97, (3, 10), generator=torch.Generator().manual_seed(1))
    words = torch.arange(10)[None] < torch.tensor([10, 6, 1])[:, None]
    return ids * words, words


@torch.no_grad()
def test_equals_berts_own_forward(encoder):
    ids, words = sentences()
    reference = encoder.bert(ids, attention_mask=words.long()).last_hidden_state
    got = encoder(ids, words)
    torch.testing.assert_close(got[words], reference[words], atol=1e-5, rtol=0)


@torch.no_grad()
def test_equals_a_slow_bert_with_the_additive_mask(encoder):
    """Scores + (1 - m) * -10000 written out, padded positions included."""
    ids, words = sentences()
    x = encoder.embed(ids)
    for layer in encoder.bert.encoder.layer:
        a, (B, L, D) = layer.attention, x.shape
        q, k, v = (f(x).view(B, L, 4, 12).transpose(1, 2) for f in (a.self.query, a.self.key, a.self.value))
        scores = q @ k.transpose(2, 3) / 12**0.5 + (1.0 - words.float())[:, None, None, :] * -10000.0
        x = a.output.LayerNorm(a.output.dense((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, D)) + x)
        f = torch.nn.functional.gelu(layer.intermediate.dense(x))
        x = layer.output.LayerNorm(layer.output.dense(f) + x)
    torch.testing.assert_close(encoder(ids, words), x, atol=1e-5, rtol=0)


@torch.no_grad()
def test_layers_in_pieces_are_the_whole(encoder):
    ids, words = sentences()
    l = encoder.embed(ids)
    for start, stop in [(0, 1), (1, 1), (1, 3)]:
        l = encoder.run(l, words, start, stop)
    assert torch.equal(l, encoder(ids, words)) and l.shape == (3, 10, 48)


@torch.no_grad()
def test_padding_changes_no_word(encoder):
    ids, words = sentences()
    whole = encoder(ids, words)
    torch.testing.assert_close(encoder(ids[1:2, :6], words[1:2, :6])[0], whole[1, :6], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(torch.where(words, ids, 42), words)[words], whole[words], atol=1e-5, rtol=0)


def test_all_padding_is_finite(encoder):
    assert encoder(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)).isfinite().all()
    mask = additive_mask(torch.tensor([[True, False]]), torch.bfloat16)
    assert mask.shape == (1, 1, 1, 2) and mask.dtype == torch.bfloat16 and mask.flatten()[0] == 0


def test_gradients_and_names(encoder):
    ids, words = sentences()
    encoder.train()(ids, words).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    names = set(encoder.bert.state_dict())
    assert {"embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"} <= names
    assert not any("pooler" in n for n in names)
    assert encoder.bert.config._attn_implementation == "sdpa" and (encoder.width, encoder.depth) == (48, 3)


@torch.no_grad()
def test_load_released(encoder):
    other = TextEncoder(**SIZES).eval()
    state = encoder.bert.state_dict()
    other.load_released(state | {"embeddings.position_ids": torch.arange(32)[None], "pooler.dense.weight": torch.zeros(48, 48)})
    ids, words = sentences()
    assert torch.equal(other(ids, words), encoder(ids, words))
    with pytest.raises(RISError, match="word_embeddings") as error:
        other.load_released({k: v for k, v in state.items() if "word_embeddings" not in k})
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_from_pretrained_folder(tmp_path):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=32, max_position_embeddings=20)).eval()
    bert.save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(str(tmp_path)).eval()
    ids, words = torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    assert (encoder.width, encoder.depth) == (16, 2)
    torch.testing.assert_close(encoder(ids, words), bert(ids).last_hidden_state, atol=1e-6, rtol=0)


def test_errors_are_one_clear_line(tmp_path, monkeypatch, encoder):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for call, word in [
        (lambda: TextEncoder.from_pretrained(str(tmp_path / "nowhere")), "nowhere"),
        (lambda: TextEncoder.from_pretrained(str(tmp_path)), "gpt2"),
        (lambda: TextEncoder(width=10, heads=3), "heads"),
        (lambda: encoder.embed(torch.zeros(1, 33, dtype=torch.long)), "33 tokens"),
    ]:
        with pytest.raises(RISError) as error:
            call()
        assert word in str(error.value) and "\n" not in str(error.value)
