from transformers import AutoModelForImageTextToText, AutoProcessor

repository, revision = "REPOSITORY", "REVISION"
processor = AutoProcessor.from_pretrained(repository, revision=revision, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repository, revision=revision, trust_remote_code=True)

images = {camera: f"{camera}.jpg" for camera in processor.cameras}  # leave out the cameras that you lack
inputs = processor(images=images, text="What is in front of the ego car?", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
