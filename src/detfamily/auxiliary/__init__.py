"""Co-DETR's auxiliary heads: in training, other detectors' heads read the encoder's output, too (arXiv 2211.12860).

A head is called as ``head(maps, images, targets, draws) -> Auxiliary``: its own losses, which train the encoder with
many more positives than one-to-one matching has, and the boxes it takes for positive, which become queries of the
decoder whose objects are known. At inference there are none.

All the boxes inside are corners in pixels of the batch; what is given on is cx, cy, w, h in (0, 1), as everywhere.
"""

from detfamily.auxiliary.atss import ATSS
from detfamily.auxiliary.faster_rcnn import FasterRCNN
from detfamily.auxiliary.structures import Auxiliary, Candidates, Objects, Positives

__all__ = ["ATSS", "Auxiliary", "Candidates", "FasterRCNN", "Objects", "Positives"]
