"""Is the quantized model still good? In the order in which the data goes:

sampling → generate             what is drawn, and the drawing, each pipeline in a process of its own
metrics, lpips, flip → scores   the distance of every picture from the original's
intervals, tripwires, gate      how sure the means are, what no score can be trusted on, what must hold
evaluate → report → page        original and candidates, report.json, one HTML page (pictures, plots)
sheet                           a contact sheet as PNG
commands                        the same on the command line
"""
