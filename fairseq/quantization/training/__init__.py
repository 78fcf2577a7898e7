"""Training with a teacher: learned scales, distillation, and the packed model of the integers that were trained."""
