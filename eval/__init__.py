"""Is the quantized model still good? In the order in which the data goes:

inputs, sampling → calling → generate   what is drawn, and the drawing, each pipeline in a process of its own
metrics, lpips, flip → scores           the distance of every picture from the original's
plugin, clip_score → standalone         what plug-ins say of each picture alone
weights; recording → replay, drift      errors of weights, layers, denoiser and text encoders, of free-running latents
intervals, tripwires, gate → judge      how sure the means are, what no score can be trusted on, what must hold
evaluate → report → page                original and candidates, report.json, one HTML page
readback → compare → compare_page       many reports beside each other, paired tests
template, plots, pictures               what both pages are made of
sheet → card                            contact sheets, and the Markdown and the picture for a model card
commands                                the same on the command line
"""
