"""What a person sees: metrics, TensorBoard, the progress line."""
