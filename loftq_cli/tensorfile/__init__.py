"""safetensors files whose layout is known before their content: headers, writing in place, hashing."""
