"""How training images are altered."""

import math
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from corenas.errors import UserError
from corenas_task_vision import Classification
from corenas_task_vision.augment import TRANSFORMS, Augment

AFFINE = {"type": "RandomAffine", "degrees": 10, "translate": [0.1, 0.1], "interpolation": "bilinear"}


def start(*augment, data="digits", **options):
    return Classification(data, augment=augment, **options).start(np.random.default_rng(0))


def wrong(*augment, **options):
    with pytest.raises(UserError) as caught:
        start(*augment, **options)
    return {fault.dotted: str(fault) for fault in caught.value.faults}


def drawn(data, seed, i=0):
    torch.manual_seed(seed)
    return data[i][0]


def test_augmentation_hangs_on_torchs_generator_alone():
    data = start(AFFINE).dataset("train", True)
    assert torch.equal(drawn(data, 1), drawn(data, 1))
    assert not torch.equal(drawn(data, 1), drawn(data, 2))


def test_images_are_augmented_only_where_that_is_asked_for_and_never_for_test():
    task = start(AFFINE, "RandomVerticalFlip")
    for split, augmented in (("train", False), ("valid", False), ("test", False), ("test", True)):
        data = task.dataset(split, augmented)
        assert torch.equal(drawn(data, 1), drawn(data, 2))
        assert data.tensors() is not None
    assert task.dataset("train", True).tensors() is None


def test_the_result_is_that_of_torchvision():
    task = start(AFFINE, "RandomInvert")
    theirs = v2.Compose(
        [v2.RandomAffine(10, [0.1, 0.1], interpolation=v2.InterpolationMode.BILINEAR), v2.RandomInvert()]
    )
    split = task.dataset("train", True).split
    torch.manual_seed(5)
    image = theirs(split.pool[int(split.places[0])])
    assert torch.equal(task.finish(image), drawn(task.dataset("train", True), 5))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_as_before(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start(AFFINE).dataset("train", True)[0]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_starting_draws_nothing_from_torchs_generator():
    before = torch.get_rng_state()
    start(AFFINE, "GaussianNoise")
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_added_to_numbers_from_0_to_1():
    task = start({"type": "GaussianNoise", "sigma": 0.5}, mean=[0.0], std=[1.0])
    image = drawn(task.dataset("train", True), 0)
    assert 0 <= image.min() < image.max() <= 1
    assert len(image.unique()) > 20
    assert abs(image - task.dataset("train", False)[0][0]).mean() > 0.1


def test_an_altered_size_is_put_right():
    task = start({"type": "RandomCrop", "size": 6})
    assert task.dataset("train", True)[0][0].shape == (1, 8, 8)


def test_transforms_may_be_nested_and_policies_named():
    task = start({"type": "RandomApply", "p": 1.0, "transforms": ["GaussianNoise", {"type": "RandomInvert", "p": 1.0}]},
                 {"type": "AutoAugment", "policy": "svhn"}, channels=3, mean=[0.0], std=[1.0])  # fmt: skip
    assert task.dataset("train", True)[0][0].shape == (3, 8, 8)
    assert "augment[0].transforms[1].type" in wrong(
        {"type": "RandomOrder", "transforms": ["RandomInvert", "RandomInvertt"]}
    )


def test_augmented_data_can_be_sent_to_another_process():
    data = start(AFFINE, "RandomErasing").dataset("train", True)
    assert torch.equal(drawn(data, 3), drawn(pickle.loads(pickle.dumps(data)), 3))


def test_all_mistakes_are_told_at_once_with_close_names():
    told = wrong(
        "RandomAffin", {"type": "RandomAffine", "degree": 10}, {"degrees": 3}, {"type": "RandomInvert", "p": 1}
    )
    assert "did you mean 'RandomAffine'" in told["augment[0].type"]
    assert "did you mean 'degrees'" in told["augment[1].degree"]
    assert "required for RandomAffine" in told["augment[1].degrees"]
    assert "required key is missing" in told["augment[2].type"]
    assert len(told) == 4


@pytest.mark.parametrize(("table", "key"), [
    ({**AFFINE, "degrees": -1}, "augment[0]"),
    ({**AFFINE, "degrees": "ten"}, "augment[0]"),
    ({**AFFINE, "interpolation": "best"}, "augment[0].interpolation"),
    ({"type": "RandomCrop", "size": 20}, "augment[0]"),
    ({"type": "GaussianNoise", "sigma": math.nan}, "augment[0]"),
    ({"type": "RandomApply", "transforms": 3}, "augment[0].transforms"),
    ({"type": "RandomApply", "transforms": [3]}, "augment[0].transforms[0]"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_told_before_training(table, key):
    assert [*wrong(table)] == [key]


def test_a_transform_that_changes_the_channels_is_refused():
    assert "3 channels" in wrong("Grayscale", channels=3)["augment[0]"]


@pytest.mark.parametrize(
    "name", ["Transform", "Lambda", "Compose", "InterpolationMode", "functional", "__doc__", "CutMix"]
)
def test_nothing_but_a_transform_of_images_can_be_named(name):
    assert [*wrong({"type": name})] == ["augment[0].type"]


@pytest.mark.parametrize("code", ["open({!r}, 'w')", "__import__('pathlib').Path({!r}).touch()", "!!python {!r}"])
def test_nothing_is_evaluated_as_code(tmp_path, code):
    text = code.format(str(tmp_path / "made"))
    assert wrong({"type": text}, {"type": "RandomAffine", "degrees": text}, {**AFFINE, "interpolation": text})
    assert not [*tmp_path.iterdir()]


EXTRA = {"Cutout": {"size": 8}, "CenterCrop": {"size": 8},
         "ColorJitter": {"hue": 0.1}, "JPEG": {"quality": [50, 90]}, "Pad": {"padding": 2},
         "Grayscale": {"num_output_channels": 3}, "GaussianBlur": {"kernel_size": 3}, "RandomCrop": {"size": 20},
         "RandomAdjustSharpness": {"sharpness_factor": 2}, "RandomAffine": {"degrees": 3}, "Resize": {"size": 9},
         "RandomApply": {"transforms": ["RandomInvert"]}, "RandomChoice": {"transforms": ["RandomInvert"]},
         "RandomOrder": {"transforms": ["RandomInvert"]}, "RandomPosterize": {"bits": 3},
         "RandomResize": {"min_size": 20, "max_size": 30}, "RandomResizedCrop": {"size": 24},
         "RandomRotation": {"degrees": 5}, "RandomShortestSize": {"min_size": 20},
         "ScaleJitter": {"target_size": [30, 30]}, "RandomSolarize": {"threshold": 100}}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The image decoding")  # JPEG, in torchvision 0.29
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_that_is_offered_works_on_images(name):
    augment = Augment([{"type": name, **EXTRA.get(name, {})}])
    augment.check(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_what_fails_on_a_rare_draw_or_a_small_image_is_a_mistake_as_well():
    augment = Augment([{"type": "RandomCrop", "size": 16}])
    augment.check(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"task\.augment\[0\]: this does not take an image of shape \(3, 8, 8\)"):
        augment(torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("value", [0.5, [0.1, 0.2, 0.4]])
def test_cutout_fills_a_square_part_of_which_may_lie_outside(value):
    (step,) = Augment([{"type": "Cutout", "size": 4, "value": value}]).steps
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    colour = torch.tensor(value).mul(255).round().byte().expand(3)
    sizes = set()
    for seed in range(60):
        torch.manual_seed(seed)
        cut = (step(image) != image).any(0).nonzero()
        top, left = cut.min(0).values.tolist()
        height, width = (cut.max(0).values - cut.min(0).values + 1).tolist()
        assert len(cut) == height * width  # a rectangle
        assert torch.equal(step_at(step, image, seed)[:, top, left], colour)
        sizes |= {height, width}
    assert sizes == {2, 3, 4}  # a middle in the first row leaves two of four rows
    assert torch.equal(image, torch.full_like(image, 255))


def step_at(step, image, seed):
    torch.manual_seed(seed)
    return step(image)


def test_cutout_of_floats_fills_with_the_value_itself_and_of_wrong_arguments_is_refused():
    (step,) = Augment([{"type": "Cutout", "size": 99, "value": 0.25}]).steps
    assert torch.equal(step(torch.ones(1, 4, 4)), torch.full((1, 4, 4), 0.25))
    for table in ({"size": 0}, {"size": 4, "value": 1.5}, {"size": 4, "value": [0.1, 0.2]}):
        assert [*wrong({"type": "Cutout", **table})] == ["augment[0]"]
