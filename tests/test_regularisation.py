"""Dropout and drop path, for all paths of a training or for one alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from corenas.export import export_subnet
from corenas.regularisation import DropPath, tell_progress, unregularised


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2)], ids=["tokens", "map"])
def test_drop_path_drops_whole_samples_in_training_and_keeps_the_mean(shape):
    drop, x = DropPath(0.25, axes=len(shape)), torch.rand(4000, *shape) + 1
    plain = export_subnet(nn.Sequential(drop), {}, x[:1]).train()
    for path in (drop, plain):
        factors = (path(x) / x).flatten(1)
        assert_close(factors, factors[:, :1].expand_as(factors))
        dropped = factors[:, 0] == 0
        assert_close(factors[~dropped, 0], torch.tensor(1 / 0.75).expand(int((~dropped).sum())))
        assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.03)
        assert torch.equal(path.eval()(x), x)


@pytest.mark.parametrize("cls", [
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
])  # fmt: skip
def test_every_kind_of_dropout_is_off_for_a_while(cls):
    model = nn.Sequential(cls(0.5), cls(0.5).eval(), nn.BatchNorm1d(2))
    with unregularised(model):
        assert [m.training for m in model] == [False, False, True]
    assert [m.training for m in model] == [True, False, True]
    with pytest.raises(RuntimeError), unregularised(model):
        raise RuntimeError
    assert model[0].training


@pytest.mark.parametrize("layer", [
    nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), nn.LSTM(8, 8, 2, dropout=0.5),
    nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)], ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_what_torchs_layers_drop_by_a_number_is_off_for_a_while(layer):
    x, inputs = torch.rand(4, 6, 8), 3 if isinstance(layer, nn.MultiheadAttention) else 1
    model = nn.ModuleList([layer]).train()
    wanted = layer.eval()(*[x] * inputs)
    layer.train()
    with unregularised(model):
        assert_close(layer(*[x] * inputs), wanted)
        assert layer.training
    dropped = layer(*[x] * inputs)
    assert not torch.allclose(*(y[0] if isinstance(y, tuple) else y for y in (dropped, wanted)))


def test_drop_path_is_off_for_a_while():
    model, x = nn.Sequential(DropPath(0.9)), torch.ones(64, 2, 2, 2)
    with unregularised(model):
        assert torch.equal(model(x), x)
    assert not torch.equal(model(x), x)


def test_drop_path_grows_with_a_training_where_it_is_scheduled():
    model = nn.Sequential(DropPath(0.4, scheduled=True), DropPath(0.4))
    assert [path.drop.p for path in model] == [0.4, 0.4]  # without a word it is what it was built with
    for share in (0.0, 0.5, 1.0):
        tell_progress(model, share)
        assert [path.drop.p for path in model] == [0.4 * share, 0.4]
