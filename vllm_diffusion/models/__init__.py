"""Model families. Each folder declares its layers, weight names and multimodal processing."""
