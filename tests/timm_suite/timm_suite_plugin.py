"""pytest plugin (``-p timm_suite_plugin``): timm's test files see our models instead of timm's.

timm's tests ask ``timm.list_models`` for their parameters when they are imported. This plugin is imported before and
leaves only our names in the answers; filters and exclusions of the tests go on, ``module=`` names timm's files and is
ignored. What is left out, by rule: a test that downloads weights, and a test of which no parameter is one of our names.
"""

import functools
import os
from typing import Any, Callable, List

import pytest
import timm

import timm_spinal

NEEDS_NETWORK = ('test_model_inference', 'test_model_load_pretrained', 'test_model_features_pretrained')
SECONDS_PER_TEST = 900  # timm's own 120 are for a machine that does nothing else
MODELS_VARIABLE = 'TIMM_SUITE_MODELS'  # names, separated by spaces; all of ours if unset

models = set(os.environ.get(MODELS_VARIABLE, '').split()) or set(timm_spinal.list_models())
deselected = {'that need the network': 0, 'that name another model': 0}


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and name.partition('.')[0] in models


def _only_ours(list_names: Callable[..., List[str]]) -> Callable[..., List[str]]:
    @functools.wraps(list_names)
    def wrapper(*args: Any, **kwargs: Any) -> List[str]:
        kwargs.pop('module', None)
        return [name for name in list_names(*args, **kwargs) if _is_ours(name)]

    return wrapper


timm.list_models = _only_ours(timm.list_models)
timm.list_pretrained = _only_ours(timm.list_pretrained)


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    kept, left_out = [], []
    for item in items:
        params = item.callspec.params.values() if hasattr(item, 'callspec') else ()
        if item.originalname in NEEDS_NETWORK:
            deselected['that need the network'] += 1
        elif not any(_is_ours(value) for value in params):
            deselected['that name another model'] += 1
        else:
            item.add_marker(pytest.mark.timeout(SECONDS_PER_TEST), append=False)
            kept.append(item)
            continue
        left_out.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, 'workeroutput'):  # one of xdist's workers, which all collect the same
        session.config.workeroutput['deselected'] = deselected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    deselected.update(getattr(node, 'workeroutput', {}).get('deselected', {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    left_out = ', '.join(f'{count} {reason}' for reason, count in deselected.items())
    terminalreporter.write_line(f'timm suite: {len(models)} models; tests left out: {left_out}')
