"""The licences that the Hub knows by an id (hf.co/docs/hub/repositories-licenses)."""
import difflib

from timm_spinal.errors import UserError

LICENCES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
""".split())  # noqa: SIM905
NEEDS_NAME = 'other'


def check_licence(licence: str | None) -> str:
    """A licence id that the Hub knows.

    Raises:
        UserError: None is given, the id is unknown, or it is one that says nothing.
    """
    if not licence:
        raise UserError('card: no licence, and the weights it started from name none; choose one with --license, for '
                        'instance --license apache-2.0')
    if licence not in LICENCES:
        near = difflib.get_close_matches(licence.lower(), LICENCES, n=1, cutoff=0.5)
        hint = f'did you mean {near[0]}?' if near else 'see hf.co/docs/hub/repositories-licenses'
        raise UserError(f'card: licence {licence!r} is no id of the Hub; {hint}')
    if licence in ('unknown', NEEDS_NAME):
        raise UserError(f'card: licence {licence!r} tells users nothing; choose one of hf.co/docs/hub/'
                        'repositories-licenses')
    return licence
