import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from common.attention import controlled
from common.backbones.bert import Bert, BertConfig, BertEncoder, CrossEncoder
from common.errors import UserError
from tests.controls import Identity, Record
from tests.goldens import cases
from tests.test_llama import published, tolerance

CASES = pytest.mark.parametrize("case", cases("_bert"), ids=lambda case: case.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SMALL = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=20, pad_token_id=0
)
KINDS = pytest.mark.parametrize("model_type", ["bert", "roberta"])


def small(cls, model_type):
    model = cls(BertConfig(**vars(SMALL) | {"model_type": model_type})).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    return model


def right_padded(rows, width):
    ids = torch.stack([pad(row, (0, width - len(row))) for row in rows])
    return ids, torch.stack([torch.arange(width) < len(row) for row in rows]).long()


# ---- against the golden tensors -------------------------------------------------------------------------------------------------------


@CASES
@DTYPES
def test_states_maps_heads_and_gradient(case, dtype, tmp_path):
    t, suffix, tolerances = case.tensors, ".f64" * (dtype == torch.float64), tolerance(case, dtype)
    close = lambda ours, name: torch.testing.assert_close(ours, t[name + suffix], **tolerances)
    classify = case.meta["class"].endswith("ForSequenceClassification")
    model = (CrossEncoder if classify else Bert).from_pretrained(published(case, tmp_path), dtype=dtype)
    [words] = [module for name, module in model.named_modules() if name.endswith("word_embeddings")]
    embedded = []
    words.register_forward_hook(lambda module, args, output: embedded.append(output.detach().requires_grad_()) or embedded[-1])
    inputs = t["in.input_ids"], t["in.attention_mask"], t.get("in.token_type_ids")
    with controlled(model, Record()) as record:
        result = model(*inputs)
    close(torch.stack(record.maps), "out.attentions")
    encoder = model if not classify else getattr(model, model.config.model_type)
    last = encoder(*inputs)
    close(torch.stack([*record.states, last]), "out.hidden_states")
    if "out.position_ids" in t:
        assert torch.equal(encoder.embeddings.positions(inputs[0]), t["out.position_ids"])
    if classify:
        close(result, "out.logits")
        (result * t["inputs.rand"]).sum().backward()
    else:
        close(result, "out.last_hidden_state")
        close(model.pooled(result), "out.pooler_output")
        (result * inputs[1][..., None] * t["inputs.rand"]).sum().backward()
    close(embedded[0].grad, "grad.inputs_embeds")


# ---- against transformers -------------------------------------------------------------------------------------------------------------

HF_SIZES = {"vocab_size": 200, "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 100}
HF_SIZES |= {"max_position_embeddings": 40, "layer_norm_eps": 1e-5}


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification", "BertForMaskedLM", "RobertaModel"])
@torch.no_grad()
def test_transformers_files_load_and_agree(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent implementation")
    theirs, options = getattr(transformers, name), {"num_labels": 3} if "Classification" in name else {}
    theirs = theirs(theirs.config_class(**HF_SIZES, pad_token_id=1, **options)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    ids, mask = right_padded([torch.randint(2, 200, (n,)) for n in (30, 12)], 30)
    ids[mask == 0] = 1
    types = torch.randint(2, (2, 30)) if name.startswith("Bert") else None
    expected = theirs(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    if "Classification" in name:
        ours = CrossEncoder.from_pretrained(tmp_path)(ids, mask, types)
        torch.testing.assert_close(ours, expected.logits, rtol=1e-4, atol=2e-4)
    states = BertEncoder.from_pretrained(tmp_path)(ids, mask, types)
    torch.testing.assert_close(states, expected.hidden_states[-1], rtol=1e-4, atol=2e-4)


# ---- names of old files ---------------------------------------------------------------------------------------------------------------


def test_names_of_the_first_files(tmp_path):
    """bert-base-uncased: a prefix, gamma and beta, a position buffer and the pre-training heads."""
    model = small(Bert, "bert")
    old = lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    state = {old(name): tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {
        "bert.embeddings.position_ids": torch.arange(20)[None],
        "cls.predictions.bias": torch.ones(50),
        "cls.seq_relationship.bias": torch.ones(2),
    }
    (tmp_path / "config.json").write_text(json.dumps(vars(SMALL)))
    save_file(state, tmp_path / "model.safetensors")
    for cls in (Bert, BertEncoder):
        loaded = cls.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.items())
        assert ("pooler.dense.weight" in loaded) == (cls is Bert)


# ---- behaviour ------------------------------------------------------------------------------------------------------------------------


@KINDS
@torch.no_grad()
def test_a_batch_equals_its_rows_and_padding_is_invisible(model_type):
    encoder, cross = small(Bert, model_type), small(CrossEncoder, model_type)
    rows = [torch.randint(1, 50, (n,)) for n in (9, 4, 7)]
    ids, mask = right_padded(rows, 9)
    for i, row in enumerate(rows):
        torch.testing.assert_close(encoder(ids, mask)[i, : len(row)], encoder(row[None])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cross(ids, mask)[i], cross(row[None])[0], rtol=1e-5, atol=1e-5)
        for pooling, expected in (("cls", encoder(row[None])[0, 0]), ("mean", encoder(row[None])[0].mean(0))):
            torch.testing.assert_close(encoder.embed(ids, mask, pooling)[i], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(encoder.embed(row[None], pooling=pooling)[0], expected, rtol=1e-5, atol=1e-5)


@KINDS
def test_an_identity_control_changes_nothing(model_type):
    model, (ids, mask) = small(CrossEncoder, model_type).double(), right_padded([torch.randint(1, 50, (n,)) for n in (9, 4)], 9)
    plain = model(ids, mask)
    with controlled(model, Identity()):
        torch.testing.assert_close(model(ids, mask), plain, rtol=0, atol=1e-9)
    with controlled(model, Record()) as record:
        model(ids, mask)
    assert len(record.maps) == 3


def test_dropout_is_for_training_only():
    model, ids = small(Bert, "bert"), torch.randint(1, 50, (1, 8))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


REAL_SIZES = {
    "bert-base-uncased": (109_482_240, (30522, 768, 12, 12, 3072, 512), {}),
    "bert-large-uncased": (335_141_888, (30522, 1024, 24, 16, 4096, 512), {}),
    "roberta-base": (124_645_632, (50265, 768, 12, 12, 3072, 514, 1, 1e-5, 1), {"model_type": "roberta"}),
    "roberta-large": (355_359_744, (50265, 1024, 24, 16, 4096, 514, 1, 1e-5, 1), {"model_type": "roberta"}),
}


@pytest.mark.parametrize(("parameters", "sizes", "options"), REAL_SIZES.values(), ids=REAL_SIZES)
def test_real_sizes(parameters, sizes, options):
    with torch.device("meta"):
        model = Bert(BertConfig(*sizes, **options))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_wrong_calls():
    for model_type, longest in (("bert", 20), ("roberta", 19)):
        small(Bert, model_type)(torch.ones(1, longest, dtype=torch.long))
        with pytest.raises(ValueError, match=f"the text has {longest + 1} tokens, this model takes {longest}: cut it"):
            small(Bert, model_type)(torch.ones(1, longest + 1, dtype=torch.long))
    with pytest.raises(UserError, match="lacks intermediate_size, max_position_embeddings, which BertConfig needs"):
        Bert.from_config({"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1})
    with pytest.raises(UserError, match="hidden_act = 'relu' is not supported"):
        Bert.from_config(vars(SMALL) | {"hidden_act": "relu"})
