"""The papers that a model stands on, and how they are cited."""
from typing import Any, NamedTuple

from timm.models import get_pretrained_cfg

from timm_spinal.layers import HEADS
from timm_spinal.models.convolutions import convolution_of


class Paper(NamedTuple):
    """A paper.

    Attributes:
        tag: Tag of its models on the Hub.
        arxiv: Its number there; '' where it has none.
        bibtex: The entry.
    """
    tag: str
    arxiv: str
    bibtex: str


SPINAL = Paper('spinalnet', '2007.03347', """@article{kabir2022spinalnet,
  title={SpinalNet: Deep Neural Network with Gradual Input},
  author={Kabir, H M Dipu and Abdar, Moloud and Khosravi, Abbas and Jalali, Seyed Mohammad Jafar and Atiya, Amir F. and Nahavandi, Saeid and Srinivasan, Dipti},
  journal={IEEE Transactions on Artificial Intelligence},
  year={2022}
}""")  # noqa: E501
PROGRESSIVE = Paper('progressivespinalnet', '2103.11373', """@article{chopra2021progressivespinalnet,
  title={ProgressiveSpinalNet architecture for FC layers},
  author={Chopra, Praveen},
  journal={arXiv preprint arXiv:2103.11373},
  year={2021}
}""")
XNODR = Paper('capsule', '2111.10854', """@article{sun2023xnodr,
  title={XnODR and XnIDR: Two Accurate and Fast Fully Connected Layers for Convolutional Neural Networks},
  author={Sun, Jian and Fard, Ali Pourramezan and Mahoor, Mohammad H.},
  journal={Journal of Intelligent \\& Robotic Systems},
  volume={109},
  number={17},
  year={2023}
}""")
CAPSULES = Paper('capsule', '1710.09829', """@inproceedings{sabour2017dynamic,
  title={Dynamic Routing Between Capsules},
  author={Sabour, Sara and Frosst, Nicholas and Hinton, Geoffrey E.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}""")
IC = Paper('ic-networks', '2102.03495', """@article{an2021ic,
  title={IC Networks: Remodeling the Basic Unit for Convolutional Neural Networks},
  author={An, Junyi and Liu, Fengshan and Zhao, Jian and Shen, Furao},
  journal={arXiv preprint arXiv:2102.03495},
  year={2021}
}""")
SHARED_BASIS = Paper('shared-basis', '2006.05066', """@inproceedings{kang2021deeply,
  title={Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks},
  author={Kang, Woochul and Kim, Daeyeon},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}""")
EFFICIENT_PROBING = Paper('attentive-probing', '2506.10178', """@inproceedings{psomas2026attention,
  title={Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency},
  author={Psomas, Bill and Christopoulos, Dionysis and Baltzi, Eirini and Kakogeorgiou, Ioannis and Aravanis, Tilemachos and Komodakis, Nikos and Karantzalos, Konstantinos and Avrithis, Yannis and Tolias, Giorgos},
  booktitle={International Conference on Learning Representations},
  year={2026}
}""")  # noqa: E501
ML_DECODER = Paper('ml-decoder', '2111.12933', """@article{ridnik2021mldecoder,
  title={ML-Decoder: Scalable and Versatile Classification Head},
  author={Ridnik, Tal and Sharir, Gilad and Ben-Cohen, Avi and Ben-Baruch, Emanuel and Noy, Asaf},
  journal={arXiv preprint arXiv:2111.12933},
  year={2021}
}""")
TIMM = Paper('', '', """@misc{rw2019timm,
  title={PyTorch Image Models},
  author={Wightman, Ross},
  year={2019},
  publisher={GitHub},
  journal={GitHub repository},
  doi={10.5281/zenodo.4414861},
  howpublished={\\url{https://github.com/huggingface/pytorch-image-models}}
}""")

PAPERS = (SPINAL, PROGRESSIVE, XNODR, CAPSULES, IC, SHARED_BASIS, EFFICIENT_PROBING, ML_DECODER)


def papers_of(architecture: str, paper_ids: Any = None) -> list[Paper]:
    """The papers of an architecture: those of `PAPERS` that a config names, and those of its head and convolutions.

    Args:
        architecture: A model's name.
        paper_ids: What the config of saved weights names. That of the registered name counts too.

    Returns:
        In the order of `PAPERS`. One that a head or a convolution names and `PAPERS` lacks comes last, with its number
        alone.
    """
    numbers, registered = set(), get_pretrained_cfg(architecture)
    for ids in (paper_ids, registered.paper_ids if registered else None):
        numbers |= {str(i).lower().removeprefix('arxiv:') for i in ([ids] if isinstance(ids, str) else ids or ())}
    parts = convolution_of(architecture), HEADS.get(architecture.rpartition('_')[2])
    of_parts = {getattr(part, 'paper', '') for part in parts} - {''}
    others = of_parts - {paper.arxiv for paper in PAPERS}
    return [paper for paper in PAPERS if paper.arxiv in numbers | of_parts] + [Paper('', i, '') for i in sorted(others)]
