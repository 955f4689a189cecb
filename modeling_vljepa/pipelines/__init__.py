"""What is done with a trained model: pipelines, streams, an endpoint. Shipped to the Hub, flat."""
