"""Co-DETR's auxiliary heads: in training, other detectors' heads read the encoder's output, too (arXiv 2211.12860).

A head is called as ``head(maps, images, objects, draws) -> Auxiliary``: its own losses, which train the encoder with
many more positives than one-to-one matching has, and all that it told apart. Of that, ``PositiveQueries`` chooses boxes
that become queries of the decoder, whose objects are known. At inference the heads have no part, unless one of them is
looked at alone: ``head.detect(maps, images)``.

All the boxes inside are corners in pixels of the batch; queries are cx, cy, w, h in (0, 1), as everywhere.
"""

from detfamily.auxiliary.atss import ATSS
from detfamily.auxiliary.faster_rcnn import FasterRCNN
from detfamily.auxiliary.fcos import FCOS
from detfamily.auxiliary.gfl import GFL
from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.auxiliary.paa import PAA
from detfamily.auxiliary.positives import PositiveQueries
from detfamily.auxiliary.retinanet import RetinaNet
from detfamily.auxiliary.structures import Auxiliary, Candidates, Objects, Positives

__all__ = [
    "ATSS",
    "FCOS",
    "GFL",
    "PAA",
    "Auxiliary",
    "AuxiliaryHead",
    "Candidates",
    "FasterRCNN",
    "Objects",
    "PositiveQueries",
    "Positives",
    "RetinaNet",
]
