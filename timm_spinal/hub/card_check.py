"""Whether the Hub would take a card and users find what they need in it; without a network."""
import math
import re
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from timm_spinal.errors import UserError

from .licences import check_licence
from .options import check_repo_name

TASK = 'image-classification'
PARTS = ('## Use', '## Model details', '## Results', '## Recipe', '## Limits', '## Citation')


def check_card(text: str) -> ModelCardData:
    """Check a card as far as it can be checked here, and return its metadata.

    Raises:
        UserError: No or malformed metadata, a licence that is missing or that the Hub does not know, wrong names of
            data sets or the base model, results that do not survive the Hub's own format, a missing part.
    """
    metadata = _read_metadata(text)
    check_licence(metadata.get('license'), metadata.get('license_name'))
    for key, wanted in (('library_name', 'timm'), ('pipeline_tag', TASK)):
        if metadata.get(key) != wanted:
            raise UserError(f'card: {key} is {metadata.get(key)!r}; it must be {wanted}, or the Hub does not find the '
                            'model')
    tags = metadata.get('tags')
    if not isinstance(tags, list) or not {'timm', 'timm-spinal'} <= set(tags):
        raise UserError(f'card: tags are {tags!r}; they must contain timm and timm-spinal')
    for key in ('datasets', 'base_model'):
        names = metadata.get(key) or []
        for name in names if isinstance(names, list) else [names]:
            check_repo_name(str(name), f'card: {key}')
    data = _check_results(metadata)
    missing = [part for part in PARTS if f'\n{part}\n' not in text]
    if missing:
        raise UserError(f'card: it has no section {missing[0]!r}; write it again with timm-spinal publish')
    block = re.search(r'```python\n(.*?)```', text, re.DOTALL)
    if not block or not block[1].startswith('import timm_spinal'):
        raise UserError('card: its first code block does not begin with "import timm_spinal", without which timm does '
                        'not know the model')
    if '```bibtex' not in text:
        raise UserError('card: it has no citation; write it again with timm-spinal publish')
    return data


def _read_metadata(text: str) -> dict[str, Any]:
    found = re.match(r'---\n(.*?)\n---\n', text, re.DOTALL)
    if not found:
        raise UserError('card: it has no metadata between --- lines at its start; write it again with timm-spinal '
                        'publish')
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as e:
        raise UserError(f'card: its metadata are not valid YAML ({" ".join(str(e).split())[:150]})') from e
    if not isinstance(metadata, dict):
        raise UserError('card: its metadata are not keys and values; write it again with timm-spinal publish')
    return metadata


def _check_results(metadata: dict[str, Any]) -> ModelCardData:
    """The model-index must come back from huggingface_hub's reader as it went in, with numbers in it."""
    index = metadata.get('model-index')
    try:
        data = ModelCardData(**{k.replace('-', '_') if k != 'model-index' else k: v for k, v in metadata.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f'card: model-index cannot be read ({" ".join(str(e).split())[:150]})') from e
    if index is None:
        return data
    if eval_results_to_model_index(data.model_name or '', data.eval_results or []) != index:
        raise UserError('card: model-index changes when the Hub\'s library reads it; write it again with timm-spinal '
                        'publish')
    for result in data.eval_results or []:
        value = result.metric_value
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
            raise UserError(f'card: {result.metric_name} is {value!r}; an accuracy lies between 0 and 1')
    if not metadata.get('metrics'):
        raise UserError('card: it has results but no list of metrics; add metrics: [accuracy]')
    return data
