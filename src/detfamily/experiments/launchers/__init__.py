"""Where the runs of a table are started: ``launcher=local``, ``slurm`` or ``ray``.

A launcher takes an order and a hold on the run's folder, and gives a job (``base.py``). What runs is the same
everywhere: a process with the folder's lock, whose end is noted in ``run.json`` (``child.py``), on a cluster inside of
``work.py``. The words of the command line are understood by ``choice.py``.
"""
