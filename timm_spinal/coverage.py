"""Check which of timm's models can take a head: every name of ``timm.list_models()``, on the meta device.

    timm-spinal coverage ['resnet*'] [--head pspinal] [--csv coverage.csv] [--jobs 2]

No weights are made or loaded. For each model the head is attached and timm's contract is checked: logits, pre-logits,
kept backbone keys, the classifier last, resets, pooling changes, train mode, dtype. A model is *accepted*, *refused*
(``attach_head`` says why) or *broken* (accepted, but a check fails, which is a bug; the exit code is then 1).
"""

import copy
import csv
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Any, Dict, List, Optional

import timm
import torch
from timm.models import model_entrypoint
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from timm_spinal.arguments import Parser, number
from timm_spinal.errors import UserError, quiet
from timm_spinal.layers import HEADS
from timm_spinal.models import attach_head, list_models
from timm_spinal.models.attach_head import CLASSIFIER_NAME, HEAD_NAME

KINDS = ('linear', 'several', 'conv', 'none')  # of classifier
KIND_TITLES = ('one nn.Linear', 'several', '1x1 conv', 'none')
NUM_CLASSES = 7
TimmModel = Any  # an nn.Module with timm's attributes, which have no type of their own


@dataclass
class Coverage:
    """What became of one model: outcome is 'accepted', 'refused' or 'broken'."""

    model: str
    family: str
    classifier: str
    outcome: str
    reason: str = ''


def classifier_modules(model: TimmModel) -> Dict[str, nn.Module]:
    """The classifiers that timm names in the model's cfg, those that exist."""
    names = model.pretrained_cfg.get('classifier') or ()
    modules = dict(model.named_modules())
    return {name: modules[name] for name in ((names,) if isinstance(names, str) else names) if name in modules}


def classifier_kind(model: TimmModel) -> str:
    """One of ``KINDS``. 'none' for encoders and for models that timm publishes without classes."""
    modules = [m for m in classifier_modules(model).values() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not modules or not model.num_classes:
        return 'none'
    if len(modules) > 1:
        return 'several'
    return 'linear' if isinstance(modules[0], nn.Linear) else 'conv'


def _given_classifiers(model: TimmModel) -> List[str]:
    """Names of what ``get_classifier`` gives, which for some distilled models is more than the cfg names."""
    given = model.get_classifier() if hasattr(model, 'get_classifier') else ()
    wanted = {id(m) for m in (given if isinstance(given, tuple) else (given,))}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _check_shape(x: Any, shape: tuple, what: str) -> None:
    found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    _check(found == shape, f'{what}: {found} instead of {shape}')


def _is_classifiers_own(key: str, classifiers: List[str], model: TimmModel) -> bool:
    """Whether a key that is gone lay in a classifier, or in a container that timm itself replaces with it."""
    modules = dict(model.named_modules())
    gone = [name for name in _with_parents(classifiers) if isinstance(modules.get(name, nn.Identity()), nn.Identity)]
    return any(key.startswith(f'{name}.') for name in gone)


def _with_parents(names: List[str]) -> List[str]:
    return ['.'.join(parts[:n]) for parts in (name.split('.') for name in names) for n in range(1, len(parts) + 1)]


def check_head(model: TimmModel, head: str) -> None:
    """Attach a head to a model on the meta device and check timm's contract.

    Raises:
        ValueError: If ``attach_head`` refuses the model.
        AssertionError: If the model breaks timm's contract afterwards.
    """
    keys = list(_without_pooling(model).state_dict() if HEADS[head].needs_feature_map else model.state_dict())
    classifiers = [*classifier_modules(model), *_given_classifiers(model)]
    attach_head(model, head, num_classes=NUM_CLASSES)

    new_keys = list(model.state_dict())
    lost = [k for k in keys if k not in set(new_keys) and not _is_classifiers_own(k, classifiers, model)]
    _check(not lost, f'lost backbone keys: {lost[:3]}')
    added = [k for k in new_keys if k not in set(keys) and not k.startswith(f'{HEAD_NAME}.')]
    _check(not added, f'added keys: {added[:3]}')
    last = [name for name, _ in model.named_parameters()][-2:]
    _check(last == [f'{CLASSIFIER_NAME}.weight', f'{CLASSIFIER_NAME}.bias'], f'last parameters: {last}')
    _check(model.get_classifier() is model.attached_head.fc, 'get_classifier')

    x = torch.zeros(2, model.in_chans, *model.pretrained_cfg['input_size'][1:], device='meta')
    with torch.no_grad():
        _check_shape(model.train()(x), (2, NUM_CLASSES), 'train mode')
        features = model.eval().forward_features(x)
        _check_shape(model.forward_head(features), (2, NUM_CLASSES), 'logits')
        _check_resets(model, features)


def _without_pooling(model: TimmModel) -> TimmModel:
    """What timm itself leaves of a model for a head that reads its map or tokens; the model where it refuses."""
    twin = copy.deepcopy(model)
    try:
        twin.reset_classifier(0, '')
    except Exception:  # each family of timm's raises another error
        return model
    return twin


def _check_resets(model: TimmModel, features: Any) -> None:
    def check_width(num_classes: int, what: str) -> None:
        _check(model.num_classes == num_classes, f'{what}: num_classes {model.num_classes}')
        _check_shape(model.forward_head(features), (2, num_classes or model.head_hidden_size), what)
        _check_shape(model.forward_head(features, pre_logits=True), (2, model.head_hidden_size), f'{what}, pre-logits')

    hidden_size = model.head_hidden_size
    for num_classes in (0, 3):
        model.reset_classifier(num_classes)
        check_width(num_classes, f'reset_classifier({num_classes})')
        _check(model.head_hidden_size == hidden_size, 'a reset changed the hidden layers')
    for pool in ('max', 'avg'):
        try:
            model.reset_classifier(5, pool)
        except Exception:
            _check_timm_refuses(model, pool)  # many families have one pooling
        else:
            check_width(5, f"global_pool='{pool}'")
    model.reset_classifier(4, reset_other=True)
    check_width(4, 'reset_other')

    model.to(torch.bfloat16)
    model.reset_classifier(6)
    features = tree_map(lambda t: t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() else t, features)
    _check(model.forward_head(features).dtype == torch.bfloat16, 'dtype')


def _check_timm_refuses(model: TimmModel, pool: str) -> None:
    try:
        model.backbone_cls.reset_classifier(model, 5, pool)
    except Exception:
        return
    raise AssertionError(f"global_pool='{pool}' works in timm but not with the head")


def cover_model(name: str, head: str) -> Coverage:
    """Check one name of timm's."""
    with quiet():
        family = model_entrypoint(name).__module__.rpartition('.')[2]
        model = timm.create_model(name, device='meta')
        kind = classifier_kind(model)
        try:
            check_head(model, head)
        except Exception as e:
            refused = isinstance(e, ValueError) and _raised_by_attach_head(e)
            return Coverage(name, family, kind, 'refused' if refused else 'broken', _one_line(e))
    return Coverage(name, family, kind, 'accepted')


def _raised_by_attach_head(error: BaseException) -> bool:
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    ours = ('timm_spinal.models.', 'timm_spinal.layers.')
    return tb is not None and tb.tb_frame.f_globals['__name__'].startswith(ours)


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f'{type(error).__name__}: {lines[0] if lines else ""}'[:300]




def timm_names(filter: str = '') -> List[str]:
    """timm's own model names, without those that this package registers."""
    ours = set(list_models())
    return [name for name in timm.list_models(filter) if name not in ours]


def cover(names: List[str], head: str, jobs: int = 1) -> List[Coverage]:
    """Check many names, in ``jobs`` processes, with a progress bar."""
    progress = partial(tqdm, total=len(names), unit='model', disable=not sys.stderr.isatty())
    if jobs <= 1:
        return [cover_model(name, head) for name in progress(names)]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(progress(pool.map(partial(cover_model, head=head), names, chunksize=4)))


def print_table(rows: List[Coverage]) -> None:
    """One line per family of timm, then the reasons, then the totals."""
    print(f'{"family":32s} models  classifier  accepted  refused  broken')
    for family in sorted({row.family for row in rows}):
        of_family = [row for row in rows if row.family == family]
        outcome = Counter(row.outcome for row in of_family)
        classified = sum(row.classifier != 'none' for row in of_family)
        print(f'{family:32s} {len(of_family):6d}  {classified:10d}  {outcome["accepted"]:8d}  {outcome["refused"]:7d}'
              f'  {outcome["broken"]:6d}')
    reasons: Dict[tuple, List[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault((row.outcome, row.classifier, row.reason), []).append(row.model)
    for (outcome, kind, reason), models in reasons.items():
        print(f'{outcome} (classifier: {kind}): {", ".join(models)}\n    {reason}')
    accepted = Counter(row.classifier for row in rows if row.outcome == 'accepted')
    total = Counter(row.classifier for row in rows)
    by_kind = ', '.join(f'{title} {accepted[kind]}/{total[kind]}' for kind, title in zip(KINDS, KIND_TITLES))
    classified = len(rows) - total['none']
    share = 100 * (sum(accepted.values()) - accepted['none']) / max(1, classified)
    print(f'accepted by classifier: {by_kind}; with a classifier {share:.1f} % of {classified}')


def write_csv(rows: List[Coverage], path: str) -> None:
    """One row per model."""
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow([field.name for field in fields(Coverage)])
        writer.writerows(astuple(row) for row in rows)


def main(argv: Optional[List[str]] = None) -> int:
    """``timm-spinal coverage``: returns 1 where a model breaks."""
    parser = Parser('timm-spinal coverage', __doc__)
    parser.add_argument('filter', nargs='?', default='', help='wildcard of timm names, all if left out')
    parser.add_argument('--head', default='pspinal', choices=list(HEADS))
    parser.add_argument('--csv', default='', metavar='FILE', help='also write one row per model here')
    parser.add_argument('--jobs', type=number(), default=os.cpu_count(), help='processes (default: %(default)s)')
    args = parser.parse_args(argv)
    names = timm_names(args.filter)
    if not names:
        raise UserError(f"No model of timm matches '{args.filter}'; give a wildcard such as 'resnet*'.")
    rows = cover(names, args.head, args.jobs)
    print_table(rows)
    if args.csv:
        write_csv(rows, args.csv)
    return int(any(row.outcome == 'broken' for row in rows))


if __name__ == '__main__':
    sys.exit(main())
