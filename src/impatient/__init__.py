"""Any PyTorch network, anytime."""
