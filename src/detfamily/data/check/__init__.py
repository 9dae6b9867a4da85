"""What is wrong with a data set: ``detfamily check-data``, whose cheap part runs whenever a data set is read.

``findings`` lists the kinds, ``annotations`` looks at a json file, ``files`` at the images, ``splits`` at training and
validation side by side, ``statistics`` counts, ``report`` prints and writes, ``command`` puts them together.
"""
