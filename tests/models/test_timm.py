"""timm's names: what each private one is needed for, that only models/_timm.py uses them, and that files do not clash.

Nothing here imports the package, so that a name which a new timm has lost is told with what it breaks.
"""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
import timm

PACKAGE = Path(__file__).resolve().parents[2] / 'timm_spinal'
HOME = PACKAGE / 'models' / '_timm.py'

NEEDED_FOR = {
    'timm.models._builder._resolve_pretrained_source':
        'the check of downloaded weights against their checksum (training, hub, detection)',
    'timm.models._builder.pretrained_cfg_for_features':
        'features_only of <backbone>_<head>, of converted models and of weights from a file',
    'timm.models._efficientnet_blocks.InvertedResidual': 'mobilenetv2_100_sb and mobilenetv2_100_sbpp',
    'timm.models._efficientnet_builder.decode_arch_def': 'mobilenetv2_100_sb and mobilenetv2_100_sbpp',
    'timm.models._efficientnet_builder.resolve_act_layer': 'mobilenetv2_100_sb and mobilenetv2_100_sbpp',
    'timm.models._efficientnet_builder.resolve_bn_args': 'mobilenetv2_100_sb and mobilenetv2_100_sbpp',
    'timm.models._features.feature_take_indices': 'forward_intermediates and pruning of the small nets (vgg5, ...)',
    'timm.models._hub.HF_WEIGHTS_NAME': 'the check of downloaded weights against their checksum',
    'timm.models._hub._PREFERRED_FILES': 'the check of weights in a local-dir: model',
    'timm.models._hub._get_safe_alternatives': 'the check of downloaded weights against their checksum',
    'timm.models._hub.hf_split': 'the check of downloaded weights of a revision, hf-hub:org/name@revision',
    'timm.models._hub.load_model_config_from_path': 'the architecture of a local-dir: model (training, detection)',
    'timm.models._hub.save_config_for_hf': 'config.json of runs and publications',
    'timm.models._input.update_model_args': 'options of heads, convolutions and packed heads in config.json',
}
ATTRIBUTES = {'_model_args': 'the arguments of a model that was changed after its creation, in config.json'}


def imported(path: Path) -> set[str]:
    """Private names of timm that a file imports or spells out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            spelled = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            spelled = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            spelled = [ast.unparse(node)]
        else:
            continue
        for name in spelled:
            parts = name.split('.')
            if parts[0] == 'timm' and any(part.startswith('_') and not part.endswith('__') for part in parts):
                names.add(name)
    return names


def attributes(path: Path) -> set[str]:
    """Which of timm's private attributes of models a file uses, also as the string of a getattr."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding='utf-8'))))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return used & {'_model_args', '_traits'}


@pytest.mark.parametrize('name', NEEDED_FOR)
def test_timm_has_the_name(name):
    module, _, attribute = name.rpartition('.')
    try:
        getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        pytest.fail(f'timm {timm.__version__} has no {name}; it is needed for {NEEDED_FOR[name]}')


def test_models_still_keep_their_arguments():
    model = timm.create_model('test_resnet', drop_path_rate=0.25, device='meta')
    assert getattr(model, '_model_args', {}).get('drop_path_rate') == 0.25, (
        f'timm {timm.__version__} keeps no _model_args; they are needed for {ATTRIBUTES["_model_args"]}')


def test_the_list_is_what_the_one_file_imports():
    assert imported(HOME) == set(NEEDED_FOR) and attributes(HOME) == set(ATTRIBUTES)


def test_no_other_file_uses_a_private_name():
    paths = [path for path in sorted(PACKAGE.rglob('*.py')) if path != HOME]
    used = {str(path.relative_to(PACKAGE)): (imported(path), attributes(path)) for path in paths}
    assert {name: names for name, names in used.items() if any(names)} == {} and len(used) > 50


def test_what_counts_as_private(tmp_path):
    path = tmp_path / 'file.py'
    path.write_text(
        'import timm\nimport timm.models._builder\nfrom timm.models import _hub\nfrom timm.layers import Mlp\n'
        'x = timm.models.resnet._cfg, timm.__version__\nfrom ._timm import a\ngetattr(m, "_model_args")\n')
    assert imported(path) == {'timm.models._builder', 'timm.models._hub', 'timm.models.resnet._cfg'}
    assert attributes(path) == {'_model_args'}


def test_no_file_of_models_has_the_name_of_a_file_of_timms():
    """timm's registry knows a model by the last part of its module's name."""
    ours = {path.stem for path in (PACKAGE / 'models').glob('*.py')} - {'__init__'}
    theirs = {module.name for module in pkgutil.iter_modules(timm.models.__path__)}
    assert ours & theirs == set() and {'resnet', '_hub'} <= theirs
