"""The licences that the Hub knows by an id (hf.co/docs/hub/repositories-licenses), and others by name and link."""
import difflib
import re
from typing import NamedTuple

from timm_spinal.errors import UserError

# the Hub's own list, as its check of a card's metadata names it
LICENCES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
""".split())  # noqa: SIM905
OTHER = 'other'
_IN_THE_REPOSITORY = ('LICENSE', 'LICENSE.md')  # files that the Hub takes in place of an address


class Licence(NamedTuple):
    """What a card says of the licence.

    Attributes:
        id: The Hub's id; 'other' for a licence without one.
        name: Name of such a licence.
        link: Address of its text, or LICENSE or LICENSE.md, a file of the repository.
    """
    id: str
    name: str = ''
    link: str = ''

    @property
    def spoken(self) -> str:
        """In one word, as timm's configs have it."""
        return self.name or self.id

    @property
    def file(self) -> str:
        """The file of the repository that has its text, if there is one."""
        return self.link if self.link in _IN_THE_REPOSITORY else ''


def choose_licence(asked: Licence, of_start: str | None = None, page: str = '', flag: str = '--license') -> Licence:
    """The licence that was asked for, else that of the weights which training started from.

    Args:
        asked: What the user gave, with the id '' where there was none.
        of_start: timm's word for the licence of the weights that training started from, if they have one. One that is
            no id of the Hub, such as 'dinov3-license', becomes a licence of that name.
        page: Address of those weights, where such a licence is told.
        flag: The option for the id, for messages; those for name and link end in -name and -link.

    Raises:
        UserError: Neither is there, the Hub knows no such id, or name and link do not go with it.
    """
    if asked.id:
        return _check_asked(asked, flag)
    if asked.name or asked.link:
        raise UserError(f'{flag}-name and {flag}-link only go with {flag} other; add it, or leave them out')
    if not of_start or of_start.lower() in ('unknown', OTHER):
        none = f'have {of_start!r}' if of_start else 'have none'
        raise UserError(f'card: no licence is given, and the weights that training started from {none}; choose one '
                        f'with {flag}, for instance {flag} apache-2.0')
    known = of_start.lower() in LICENCES
    return Licence(of_start.lower()) if known else Licence(OTHER, of_start, page)


def _check_asked(asked: Licence, flag: str) -> Licence:
    licence = asked._replace(id=check_licence(asked.id.lower(), asked.name, flag))
    if licence.id != OTHER and (licence.name or licence.link):
        raise UserError(f'{flag} {licence.id}: it is a licence id of the Hub, which knows its name and text; leave out '
                        f'{flag}-name and {flag}-link, or give {flag} other')
    if licence.link and not licence.file and not re.fullmatch(r'https?://\S+', licence.link):
        raise UserError(f'{flag}-link {licence.link}: it is not an address; write it as https://..., or as '
                        f'{" or ".join(_IN_THE_REPOSITORY)} for that file of the run folder, which is published too')
    return licence


def check_licence(licence: str | None, name: str | None = '', flag: str = '--license') -> str:
    """A licence id that the Hub knows.

    Args:
        licence: The id.
        name: Name of the licence, where the id is 'other'.
        flag: The option for the id, for messages.

    Raises:
        UserError: None is given, the Hub does not know it, or it is 'other' and there is no name.
    """
    if not licence:
        raise UserError(f'card: no licence is given; choose one with {flag}, for instance {flag} apache-2.0')
    if licence not in LICENCES:
        near = difflib.get_close_matches(licence, LICENCES, n=1, cutoff=0.5)
        hint = f'did you mean {near[0]}?' if near else 'see hf.co/docs/hub/repositories-licenses.'
        raise UserError(f'card: licence {licence!r} is not a licence id of the Hub; {hint} For a licence without id, '
                        f'give {flag} other {flag}-name {licence} {flag}-link ADDRESS')
    if licence == OTHER and not name:
        raise UserError(f"card: licence 'other' needs a name; add {flag}-name, and "
                        f'{flag}-link with the address of its text')
    return licence
