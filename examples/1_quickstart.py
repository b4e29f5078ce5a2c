"""Answer by a deadline: exits on a network, training, a policy, and runs against the clock.

python examples/1_quickstart.py
"""

import impatient


def main(epochs: int = 8) -> list[impatient.Answer]:
    data = impatient.load_data("digits")
    x = data.example()
    # or any nn.Module of yours
    backbone = impatient.load_model("impatient:resnet:n=2,c=8", num_classes=10, in_channels=1)
    network = impatient.attach_exits(backbone, count=4, heads="relu_linear", example=x)
    print(network.describe(x))

    impatient.fit(network, data, recipe=impatient.Recipe(epochs=epochs, batch_size=64))
    costs = impatient.profile(network, x)
    validation = impatient.record(network, data, split="validation")
    policy = impatient.fit_thresholds(validation, costs, max_accuracy_loss=0.03)

    test = impatient.record(network, data, split="test")
    for row in impatient.evaluate(test, costs, policy).rows:
        print(f"{row.name:24} accuracy {row.accuracy.value:6.1%}")

    answers = []
    with impatient.Runner(network, costs) as runner:
        runner.warm_up(x)
        # just enough for each exit, by the profile
        for cost in costs.contract_s(statistic="p99"):
            deadline = impatient.Deadline.after(1.1 * cost + 1e-4)
            answers.append(runner.run(x, deadline=deadline))
    for answer in answers:
        print(f"exit {answer.exit} in {answer.elapsed_s * 1e3:.2f} ms: {answer.stopped_by}")
    return answers


if __name__ == "__main__":
    main()
