"""Experiments: the same training under many arms and seeds, from one file, side by side.

``spec`` reads the file, ``trainings`` makes one arm's training with one seed (a fleet of production
machines on virtual time, or a baseline without a fleet), ``one_run`` runs it round by round with
all that is needed to go on later, ``runner`` runs them all, ``tables`` and ``plots`` say what came
out.
"""
