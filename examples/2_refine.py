"""A crude answer first, a better one later: nothing is computed twice.

python examples/2_refine.py

A network sorts handwritten digits for a machine that must begin to move at once. The crude answer
says which way; while the machine moves, the same run goes on, and the refined answer may still
correct it.
"""

import torch

import impatient


def main(epochs: int = 3, pictures: int = 200) -> dict[str, float]:
    torch.manual_seed(0)
    data = impatient.load_data("digits")
    backbone = impatient.load_model(
        "impatient:resnet:n=1,c=8", num_classes=data.num_classes, in_channels=1
    )
    network = impatient.attach_exits(backbone, count=3, example=data.example())
    impatient.fit(
        network, data, recipe=impatient.Recipe(epochs=epochs, batch_size=64, lr=0.1), progress=False
    )
    network = network.cpu().eval()
    examples = data.examples("test")
    x = data.preprocess(examples.take(torch.arange(pictures)))
    labels = examples.labels[:pictures]

    runner = impatient.Runner(network, impatient.profile(network, x[:1], repeats=50))
    runner.warm_up(x)
    crude_macs = runner.costs.cumulative("macs", "contract")[0]
    crude = []
    refined = []
    for picture, label in zip(x, labels, strict=True):
        with runner.open(picture[None]) as run:
            # or deadline=impatient.Deadline.after(0.002)
            answer = run.run(limits={"macs": crude_macs})
            crude.append(bool(answer.output.argmax() == label))
            # ... the machine begins to move ...
            # goes on from there
            answer = run.run()
            refined.append(bool(answer.output.argmax() == label))
    found = {"crude": sum(crude) / pictures, "refined": sum(refined) / pictures}
    print(f"right at once: {found['crude']:.1%}; right in the end: {found['refined']:.1%}")

    # the same with a run on the runner's own thread
    with runner.start(x[:1], resumable=True) as started:
        answer = started.interrupt()
        print(f"interrupted: exit {answer.exit} of {network.num_exits - 1}")
        print(f"refined: exit {started.refine().result().exit}")
    runner.close()
    return found


if __name__ == "__main__":
    main()
