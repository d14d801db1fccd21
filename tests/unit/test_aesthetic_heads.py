"""Aesthetic heads of others, read from their files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from trainyard.trainers.scores.aesthetic_heads import (
    AestheticHead,
    AestheticMLP,
    check_embedding_width,
    read_aesthetic_head,
    read_siglip_pooler,
)

SIZES = (768, 1024, 128, 64, 16, 1)


def laion(sizes=SIZES, seed=0, prefix="layers."):
    """LAION's predictor as its training script writes it: dropout takes places 1, 3 and 5."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for place, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        tensors[f"{prefix}{place}.weight"] = torch.randn(b, a, generator=rng) / a**0.5
        tensors[f"{prefix}{place}.bias"] = torch.randn(b, generator=rng)
    return tensors


def sequential_of(sizes, between, seed=0):
    """nn.Sequential of linear layers with these modules after each but the last."""
    torch.manual_seed(seed)
    modules = []
    for number, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        modules += [nn.Linear(a, b), *(between[number] if number < len(between) else ())]
    return nn.Sequential(*modules).eval()


def torch_ratings(network, embedding):
    with torch.no_grad():
        return network(nn.functional.normalize(embedding, dim=-1))[:, 0]


RELU, DROP = nn.ReLU(), nn.Dropout(0.2)
KNOWN_HEADS = {
    "LAION's linear": ((8, 24, 16, 8, 4, 1), [[DROP], [DROP], [DROP]]),
    "LAION's ReLU": ((8, 24, 16, 8, 4, 1), [[RELU, DROP], [RELU, DROP], [RELU, DROP], [RELU]]),
    "V2.5": ((1152, 1024, 128, 64, 16, 1), [[DROP]] * 4),
    "nothing between": ((8, 6, 4, 1), []),
}


@pytest.mark.parametrize("kind", KNOWN_HEADS)
@pytest.mark.parametrize("prefix", ["layers.", "", "scoring_head."])
def test_a_head_rates_as_the_sequence_it_was_saved_from(tmp_path, kind, prefix):
    network = sequential_of(*KNOWN_HEADS[kind])
    torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / "head.pth")
    embedding = torch.randn(16, KNOWN_HEADS[kind][0][0])
    ratings = read_aesthetic_head(tmp_path / "head.pth")(embedding)
    assert torch.allclose(ratings, torch_ratings(network, embedding), atol=1e-6)


def test_relu_is_part_of_what_identifies_a_head(tmp_path):
    plain, relu = (sequential_of((8, 24, 16, 8, 4, 1), KNOWN_HEADS[k][1]) for k in ("LAION's linear", "LAION's ReLU"))
    for name, network in (("plain", plain), ("relu", relu)):
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    names = [read_aesthetic_head(tmp_path / f"{name}.pth").state_dict().keys() for name in ("plain", "relu")]
    assert names[0] < names[1]


@pytest.mark.parametrize(
    "names", [("layers.0", "layers.2"), ("layers.0", "layers.3"), ("fc1", "fc2"), ("a.0", "b.1"), ("first", "second")]
)
def test_a_head_that_does_not_say_what_lies_between_its_layers_is_refused(tmp_path, names):
    sizes = ((3, 4), (1, 3))
    tensors = {f"{name}.weight": torch.zeros(size) for name, size in zip(names, sizes, strict=True)}
    save_file(tensors, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"own.safetensors does not say what lies between its layers .*rename the"):
        read_aesthetic_head(tmp_path / "own.safetensors")


def by_hand(tensors, embedding):
    h = embedding / embedding.norm(dim=-1, keepdim=True)
    for place in (0, 2, 4, 6, 7):
        h = h @ tensors[f"layers.{place}.weight"].T + tensors[f"layers.{place}.bias"]
    return h[:, 0]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_laions_mlp_has_no_activations_and_sees_embeddings_of_unit_length(tmp_path, ending):
    tensors, path = laion(), tmp_path / f"head.{ending}"
    torch.save(tensors, path) if ending == "pth" else save_file(tensors, path)
    embedding = torch.randn(3, 768)
    head = read_aesthetic_head(path)
    assert torch.allclose(head(embedding), by_hand(tensors, embedding), atol=1e-5)
    assert torch.allclose(head(embedding), head(7 * embedding), atol=1e-5)


def test_the_first_predictor_is_one_layer(tmp_path):
    torch.save({"weight": torch.full((1, 4), 2.0), "bias": torch.tensor([1.0])}, tmp_path / "v1.pth")
    assert read_aesthetic_head(tmp_path / "v1.pth")(torch.tensor([[3.0, 0, 4, 0]])).tolist() == pytest.approx(
        [1 + 2 * (0.6 + 0.8)]
    )


def test_layers_are_put_in_the_order_of_their_numbers(tmp_path):
    tensors = {
        f"layers.{i}.{part}": value
        for i in range(11)
        for part, value in (("weight", torch.eye(2)), ("bias", torch.zeros(2)))
    }
    tensors |= {"layers.11.weight": torch.tensor([[1.0, 0.0]]), "layers.11.bias": torch.zeros(1)}
    torch.save(tensors, tmp_path / "deep.pth")
    assert read_aesthetic_head(tmp_path / "deep.pth").width == 2


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_file_that_would_run_code_is_not_opened(tmp_path, capsys):
    torch.save({"weight": Surprise()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="could run code"):
        read_aesthetic_head(tmp_path / "bad.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conv.weight": torch.zeros(1, 2, 3, 3)}, "is not an aesthetic head"),
        ({"a.weight": torch.zeros(1, 2), "norm": torch.zeros(2)}, "is not an aesthetic head"),
        ({"layers.0.weight": torch.zeros(3, 2), "layers.1.weight": torch.zeros(1, 4)}, "do not follow on each other"),
        ({"layers.0.weight": torch.zeros(7, 2)}, "do not follow on each other to one rating"),
    ],
)
def test_files_of_another_kind_are_refused_in_words(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        read_aesthetic_head(tmp_path / "other.safetensors")


def test_a_wrong_encoder_is_named_with_the_right_one():
    head = AestheticHead(AestheticMLP([(torch.zeros(1, 768), None)]))
    check_embedding_width(head, 768)
    with pytest.raises(ValueError, match=r"768 features, .* gives 1280 \(CLIP ViT-bigG/14\)\. It needs CLIP ViT-L/14"):
        check_embedding_width(head, 1280)


def test_siglips_pooling_is_that_of_transformers(tmp_path):
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    torch.manual_seed(0)
    oracle = SiglipMultiheadAttentionPoolingHead(
        SiglipVisionConfig(hidden_size=64, intermediate_size=96, num_attention_heads=1)
    )
    nn.init.normal_(oracle.probe)
    tensors = {f"vision_model.head.{name}": value.detach().clone() for name, value in oracle.state_dict().items()}
    save_file({**tensors, "vision_model.post_layernorm.weight": torch.zeros(64)}, tmp_path / "siglip.safetensors")
    tokens = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert torch.allclose(read_siglip_pooler(tmp_path / "siglip.safetensors")(tokens), oracle(tokens), atol=1e-5)


def test_a_siglip_file_without_its_pooling_layer_says_which_file_has_it(tmp_path):
    save_file({"vision_model.post_layernorm.weight": torch.zeros(64)}, tmp_path / "sigclip.safetensors")
    with pytest.raises(ValueError, match="google/siglip-so400m-patch14-384"):
        read_siglip_pooler(tmp_path / "sigclip.safetensors")
