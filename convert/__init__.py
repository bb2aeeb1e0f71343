"""From a recipe to a checkpoint, in the order in which the data goes:

document → validation → schema, recipe  YAML with lines, the schema, all problems at once
layout → reading → checkpoint       safetensors headers (pickles: of *.bin), blocks of rows, parts of a pipeline
tracing, text_encoder → single_file one file in its authors' names (configs: the pipeline beside it)
hub, selection → download           a repository at one commit, the files of its pipeline, an outline for the plan
variants                            a local folder with fp16 in its names, seen under plain ones
opening, shards                     the model of a recipe, the files of a component
ggml → gguf, scaled, fourbit        codes and scales of other tools, in files and folders
decoded, foreign                    a quantized component read as floats
bare                                a model that is one component, without a pipeline around it
architecture, profile, inference    the layers of a class on the meta device, what is known or inferred of it
pattern → routing                   which backend every layer gets
statistics                          what calibration measured, for the layers that ask for it
entry → container → copies → plan   what becomes of each tensor, how a component is stored, what goes along
fold → describe → table             the plan for configs, machines and people
files → journal → output            whole files only, what must not change until the end, the folder
writer → streaming → job            one file, blocks of rows on their way to it, the run (workers: a thread per core)
dequantize                          the run that only decodes
seal, record → fidelity → verify    what the job wrote, held against its source, loaded (reload, loading)
markdown, snippet, origin, quality   what a model card is made of
card → upload → push                the card, one commit, what is refused before it
inspection, doctor                  any file or folder; this machine
progress, noise, garbage            bars on stderr; the libraries' remarks kept off it, their objects left alone
commands                            the small commands around a job
conversion, conversion_command      the same weights in another dtype or in other files
"""
