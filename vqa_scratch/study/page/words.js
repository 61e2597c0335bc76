// The words of the trade that the page explains where they stand, in the singular.

export const GLOSSARY = {
  attention: "How much a token takes from each other token: weights that sum to 1.", "cross-attention": "Attention from the text that is written to the image and the question.",
  "self-attention": "Attention among the tokens of one sequence.", certificate: "The measured difference between the weights shown here and those that ran.",
  decoder: "The part of the model that writes the answer, token by token.", distance: "How far from the asking token the attention lies on average, in tokens.",
  embedding: "The vector that a token starts as, before any layer.", expert: "One of several parts of a layer; each token goes through some of them.",
  entropy: "How widely attention is spread, in nats: 0 if it is all on one token.", head: "One of the parallel parts of an attention, each with its own weights.",
  key: "What a token offers to be found by; a query that fits it reads that token.", layer: "One step of the model; each reads the states that the one before left.",
  logit: "The score of a word before the softmax makes probabilities of all scores.", "logit lens": "The model's last step, applied to the states of an earlier layer.",
  "log-sum-exp": "The logarithm of the sum of exponentials: what softmax divides by.",
  lse: "Log-sum-exp: the logarithm of the sum of exp(score) over all keys, what softmax divides by.", mask: "Minus infinity where a token must not be read, else 0.",
  mlp: "The part of a layer that works on each token alone.", patch: "A square of the image, one token to the model.",
  "output projection": "The matrix that turns what a head read into what it adds to the token's state.", "q·k": "The product of query and key: how well they fit.",
  relevancy: "Attention weighted by what it did for the answer.", router: "The part of a layer that chooses experts for each token.",
  rollout: "Attention multiplied through all layers.", scale: "1 over the square root of a head's size; it keeps scores small.",
  sinks: "Tokens without content that take attention: class token, separators, first token.", softmax: "Turns scores into shares that sum to 1.",
  token: "A piece of text, or of an image, that the model handles as one.", vocabulary: "All tokens that the model can write.",
};

// Ways to say where the model looks, in the order they are offered.
export const METHODS = {
  parts: "Parts: what each image token adds to the similarity through the attention of the token that is pooled (Gandelsman et al. 2024). With the rest, which is of no place, they are the similarity exactly.",
  nearness: "Nearness: each image token through the last layer alone, as if it were all the image: how similar it then is to the text, above the mean place. What a token holds; it adds up to nothing.",
  relevancy: "Relevancy: attention weighted by what it did for this token's logit (Chefer et al. 2021), carried from the answer back through the encoders.",
  rollout: "Rollout: attention multiplied through all layers, half of every state being its residual (Abnar and Zuidema 2020). Says where information could come from.",
  activation: "Activation: how much each token of the image itself raises this word, whether the model looks at it or not, with what earlier words explain taken out (Token Activation Maps, Li et al. 2025).",
  mean: "Mean: plain weights, averaged over all layers and heads. What was looked at, whether it was used or not.",
  layer: "Layer: the weights of one layer, averaged over its heads.",
  head: "Head: the weights of a single head, exactly as they ran.",
};

export const KINDS = {
  image: "Inside the image", text: "Inside the question", encoder: "Inside the article", decoder: "Inside the answer", stream: "Inside the stream",
};

// The attention that reads the image and the words, by the way in which the model does it.
export const WAYS = { cross: "Cross-attention", prefix: "Self-attention to the prefix", stream: "Self-attention of the first token" };
