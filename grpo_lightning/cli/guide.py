"""Short texts that answer "what can I do here?" at once; the complete help takes Lightning's import."""

_ROOT = """\
GRPO fine-tuning of language models in PyTorch Lightning, with vLLM rollouts.

usage: grpo-lightning COMMAND ...

  fit           train a policy
  validate      answer the held-out tasks greedily
  predict       write completions with logprobs and rewards for a file of prompts
  resume        go on with a run from its newest checkpoint
  reward-check  call the rewards on known answers, without loading a model
  doctor        say what was wrong with a run, also with one of another trainer
  replay        compute loss and ratios of a stored epoch again
  export        write a run's policy for other tools
  trajectories  write what a run sampled as a page to look at, token by token
  ls            list the configurations that come with the package
  cp            copy one of them

  grpo-lightning ls                        # what there is to start from
  grpo-lightning cp demo_cpu my.yaml
  grpo-lightning fit -c my.yaml --dry-run  # check the settings first
  grpo-lightning fit -c my.yaml

COMMAND -h explains a command; --version prints the version.
GRPO_LIGHTNING_TRACEBACK=1 shows where an error came from."""

_FIT = """\
Train a policy: every epoch samples completions, scores them and updates the policy.

usage: grpo-lightning fit -c FILE [-c FILE ...] [--SETTING VALUE ...] [--dry-run [DIR]]

  -c FILE          settings in YAML; later files and settings on the command line win
  --dry-run [DIR]  check everything without loading a model, print the batches, write the resolved settings
  --print_config   print the resolved settings

Needed: model.model, data.tasks, and data.rewards or data.environment. Used most:

  --model.model             directory or hub name of the model
  --model.learning_rate     peak learning rate (1e-4)
  --data.tasks              where prompts come from, e.g. grpo_lightning.tasks.JsonlTasks
  --data.rewards            reward functions by import path, e.g. [my_package.correct]
  --data.environment        what tasks are played in over several turns, e.g. grpo_lightning.envs.GuessNumber
  --data.episodes.max_turns most actions of an episode (16)
  --data.engine             grpo_lightning.VLLMEngine (default) or grpo_lightning.TransformersEngine
  --data.prompts_per_rollout, --data.samples_per_prompt    prompts an epoch (16), completions of each (8)
  --data.updates_per_rollout                               optimizer steps an epoch (1)
  --data.max_tokens         longest completion (256)
  --trainer.max_epochs      rollouts in all (15)

Examples:

  grpo-lightning fit -c demo.yaml --trainer.max_epochs 30
  grpo-lightning fit -c demo.yaml --data.engine grpo_lightning.TransformersEngine
  grpo-lightning fit -c demo.yaml --model my_package.MyModule --model.my_setting 3

More: --help lists every setting, --model.help my_package.MyModule those of your class,
--data.engine.help grpo_lightning.VLLMEngine those of an engine."""

_VALIDATE = """\
Answer the held-out tasks greedily and print the mean rewards and the accuracy.

usage: grpo-lightning validate -c FILE [--ckpt_path FILE] [--SETTING VALUE ...]

  -c FILE           settings in YAML, for example config.yaml of a run
  --ckpt_path FILE  checkpoint to load; the untrained policy without it

Example:

  grpo-lightning validate -c runs/demo/version_0/config.yaml \\
      --ckpt_path runs/demo/version_0/checkpoints/last.ckpt

More: --help lists every setting."""

_PREDICT = """\
Write completions with logprobs and rewards, as JSON Lines, for a file of prompts.

usage: grpo-lightning predict -c FILE --data.predict_tasks TASKS [--ckpt_path FILE] [--SETTING VALUE ...]

  -c FILE                     settings in YAML, for example config.yaml of a run
  --ckpt_path FILE            checkpoint to load; the untrained policy without it
  --data.predict_tasks        the prompts, e.g. grpo_lightning.tasks.JsonlTasks; answers are not needed
  --data.predict_samples      completions of each prompt (1)
  --data.predict_temperature  sampling temperature (0, greedy)

Example:

  grpo-lightning predict -c runs/demo/version_0/config.yaml \\
      --ckpt_path runs/demo/version_0/checkpoints/last.ckpt \\
      --data.predict_tasks grpo_lightning.tasks.JsonlTasks --data.predict_tasks.path prompts.jsonl

More: --help lists every setting."""

_COMMANDS = {"fit": _FIT, "validate": _VALIDATE, "predict": _PREDICT}


def root_guide() -> str:
    """What ``grpo-lightning --help`` prints."""
    return _ROOT


def guide(command: str) -> str:
    """What ``-h`` prints for one of Lightning's commands: at most 40 lines."""
    return _COMMANDS[command]
