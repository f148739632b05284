"""timm's own ``tests/test_models.py`` on the models that this package registers.

    python -m tests.timm_suite --all -n 2                  # every model
    python -m tests.timm_suite --representative -n 2       # one of every family and head
    python -m tests.timm_suite --models resnet18_spinal vgg5 -k backward

The file comes from timm's sdist, which pip fetches once into a cache; it is no part of this repository.
"""
