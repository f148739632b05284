"""Which weights of a backbone a head was trained on, for a publication of the head alone."""
import torch
from timm.models import get_pretrained_cfg, parse_model_name, split_model_name_tag

from timm_spinal.errors import UserError
from timm_spinal.models._variants import TAG_PREFIX
from timm_spinal.models.head_only import Backbone, backbone_weights, hash_tensors, is_in_head

from .publication import Publication
from .recipe import started_from_weights

_WHOLE = 'publish the whole model, without --head-only'


def frozen_backbone(publication: Publication) -> Backbone:
    """The weights that the backbone of a publication still has.

    Raises:
        UserError: There is no attached head, the weights have no name, cannot be had, or were changed by training.
    """
    name = publication.architecture
    own = {key: value for key, value in publication.state_dict.items() if not is_in_head(key)}
    if len(own) == len(publication.state_dict):
        raise UserError(f'--head-only: {name} has no attached head; {_WHOLE}')
    start = _start_of(publication)
    weights = backbone_weights(start)
    changed = [key for key in own if key not in weights or own[key].shape != weights[key].shape
               or not torch.equal(own[key].cpu(), weights[key].to(own[key].dtype))]
    if changed or weights.keys() - own.keys():
        first = changed[0] if changed else min(weights.keys() - own.keys())
        raise UserError(f'--head-only: the backbone is not that of {start} any more ({first} differs); train with '
                        f'--freeze backbone, or {_WHOLE}')
    return Backbone(start, hash_tensors(weights))


def _start_of(publication: Publication) -> str:
    """What ``timm.create_model`` takes for the weights of the backbone that training started from."""
    nameless = UserError(f'--head-only: the backbone of {publication.architecture} started from no weights with a name '
                         f'(--pretrained), which others could fetch; {_WHOLE}')
    if publication.args is not None:
        if not started_from_weights(publication.args):
            raise nameless
        source, name = parse_model_name(publication.args.model)
        if source == 'hf-hub':
            return publication.args.model
        cfg = None if source else get_pretrained_cfg(name)
        tag = cfg.tag if cfg is not None and cfg.has_weights else None
    else:
        saved = getattr(publication.model, 'pretrained_cfg', {})
        if saved.get('source') == 'hf-hub':
            return f'hf-hub:{saved["hf_hub_id"]}'
        tag = saved.get('tag') if saved.get('hf_hub_id') or saved.get('url') or saved.get('file') else None
    if tag is None:
        raise nameless
    plain = split_model_name_tag(publication.architecture)[0].rpartition('_')[0]
    return '.'.join(filter(None, (plain, tag.removeprefix(TAG_PREFIX).removeprefix('_'))))
