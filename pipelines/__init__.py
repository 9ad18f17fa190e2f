"""Pipelines: a YAML file of stages, run in order, each once for its settings and inputs.

``dqrm.pipelines.config`` reads the file, ``dqrm.pipelines.runner`` runs it,
``dqrm.pipelines.stage`` says what a stage is, and ``dqrm.pipelines.stages`` holds them.
"""
