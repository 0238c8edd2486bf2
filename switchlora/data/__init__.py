"""Read images and text, form batches that follow from a seed, and load them."""

from switchlora.data.batches import (
    crop_and_flip as crop_and_flip,
    decode as decode,
)
from switchlora.data.contents import (
    Contents as Contents,
    Shared as Shared,
    comparable as comparable,
    contents_of as contents_of,
    shared_items as shared_items,
)
from switchlora.data.duplicates import (
    Duplicates as Duplicates,
    find_duplicates as find_duplicates,
)
from switchlora.data.images import (
    Digits as Digits,
    Unlabelled as Unlabelled,
    fashion_mnist as fashion_mnist,
    image_folder as image_folder,
    torchvision_data as torchvision_data,
)
from switchlora.data.loaders import (
    Data as Data,
    build_data as build_data,
    build_splits as build_splits,
    build_test as build_test,
    build_val as build_val,
)
from switchlora.data.shift import (
    Effect as Effect,
    TwoSample as TwoSample,
    effects as effects,
    label_shift as label_shift,
    two_sample_test as two_sample_test,
)
from switchlora.data.split import IGNORED as IGNORED, Split as Split, classes_of as classes_of
from switchlora.data.survey import Survey as Survey, hashed as hashed, survey as survey
from switchlora.data.text import Windows as Windows, build_text as build_text
from switchlora.data.workers import Loader as Loader
