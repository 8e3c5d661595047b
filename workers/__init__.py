"""Model workers: models, parallelism, pipelines, algorithms, data. Owns torch."""
