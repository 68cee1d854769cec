"""The names of the files in a bundle."""

MANIFEST = "manifest.json"
VISION = "vision.onnx"
# One decoder header per dialect. Float weights lie once, in a file that both share; quantized ones lie once for each.
DECODERS = {"standard": "decoder.onnx", "onnxruntime": "decoder.onnxruntime.onnx"}
# Long prompts in int8, for ONNX Runtime on CPUs; optional.
PROMPTS = "prompts.onnx"
EMBEDDINGS = "embeddings.bin"
TOKENIZER = "tokenizer.json"
# A `checkpoint.record.QuantizationRecord`, where the checkpoint brought one.
QUANTIZATION = "quantization.json"
# Folders of TensorRT engines, `engines/NAME/`, and the files in each beside those that its record lists.
ENGINES = "engines"
ENGINE_RECORD = "engine.json"
RUNTIME_CACHES = {"decoder": "decoder.runtime.cache", "vision": "vision.runtime.cache"}
