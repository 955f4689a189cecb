"""Applications of a trained model: pipelines, streams, an endpoint. They ship flat to the Hub."""
