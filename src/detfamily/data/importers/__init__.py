"""``detfamily import-data``: the boxes of other layouts as COCO json files.

``voc`` and ``yolo`` read a layout, ``imported`` is what they read and how it becomes COCO json, ``command`` puts them
together.
"""
