"""School and everyday questions with their answers, written for this project (Apache-2.0, like all of it).

None of them comes from a data set or a benchmark. Question text is rare in encyclopaedias and news, and it is what
many models are asked; three layouts, as the layout is much of what makes it a kind of its own.
"""

from __future__ import annotations

from slimexport.texts import Text

LICENSE = "Apache-2.0 (written for slimexport)"
_LETTERS = "ABCD"

# question | right answer | three wrong ones
_ITEMS = """
Which part of a plant takes up most of its water?|the roots|the flowers|the leaves|the seeds
What do we call an animal that eats both plants and meat?|an omnivore|a herbivore|a carnivore|a parasite
Why does a metal spoon in hot soup become hot itself?|heat is conducted along the metal|the spoon makes heat of its own|soup sticks to the metal|metal shines in warm light
Which of these is a change of state?|ice melting in a glass|paper being torn|wood being sawn|sugar being weighed
What keeps the planets on their paths around the Sun?|gravity|magnetism|friction|the solar wind
Which organ pumps blood through the body?|the heart|the liver|the lungs|the stomach
A lamp is on the far side of a wooden board. Why is there a shadow on the wall?|light does not pass through wood|wood makes darkness|light bends around the board|the wall drinks the light
What is the main source of energy for life on Earth?|sunlight|the Moon|volcanoes|the wind
Which material would be best for the handle of a frying pan?|wood|iron|copper|aluminium
How can salt be got back from salt water?|by letting the water evaporate|by pouring it through paper|by using a magnet|by cooling it a little
Which of these animals breathes through gills all its life?|a trout|a whale|a frog|a duck
What does a thermometer measure?|temperature|weight|pressure|speed
Why do boats made of steel float?|they push away water that weighs as much as they do|steel is lighter than water|waves hold them up|salt glues them to the surface
Which force slows a sledge on dry grass?|friction|gravity|buoyancy|magnetism
What happens to most materials when they are heated?|they expand|they shrink|they turn blue|they lose their weight
Which sense do we lose for a while when the nose is blocked?|smell|sight|hearing|touch
What is the smallest unit of living things?|the cell|the organ|the bone|the tissue
Which of these is a renewable source of energy?|wind|coal|natural gas|petroleum
How long does the Earth take to turn once around its axis?|about a day|about a week|about a month|about a year
Why is the Moon bright at night?|it reflects the light of the Sun|it burns slowly|it glows with heat|it holds starlight
Which gas makes up most of the air?|nitrogen|oxygen|carbon dioxide|hydrogen
What do bees carry from flower to flower?|pollen|soil|rain|roots
Which of these would a magnet pick up?|an iron nail|a silver ring|a copper coin|a plastic comb
What is formed when molten rock from a volcano cools?|igneous rock|sandstone|chalk|coal
Why do people sweat when they run?|the water cools the skin as it evaporates|the skin needs washing|the muscles are leaking|salt must be stored
Which part of the eye changes its size in bright light?|the pupil|the eyebrow|the retina|the lashes
Two cars leave at the same time; the first drives at 60 km/h, the second at 80 km/h. How far apart are they after one hour on the same road?|20 km|60 km|80 km|140 km
What is seven times eight?|56|54|63|48
Which number is prime?|29|27|33|39
What is a quarter of 96?|24|32|16|48
A shirt of 40 euros is sold at 25 per cent off. What does it cost now?|30 euros|15 euros|35 euros|25 euros
How many degrees do the angles of a triangle have together?|180|90|270|360
What comes next: 2, 6, 18, 54, ...?|162|108|72|216
Which fraction is the largest?|3/4|2/3|5/8|1/2
A bag holds three red and five blue marbles. What is the chance of drawing a red one?|3/8|3/5|1/3|5/8
How many minutes are there in two and a half hours?|150|120|180|90
The mean of 4, 8 and 12 is|8|6|10|24
If a dozen eggs costs 3.60, what does one egg cost?|0.30|0.36|0.25|0.40
What is the square root of 144?|12|14|11|72
Which of these shapes has no corners?|a circle|a square|a hexagon|a kite
A recipe for four people needs 300 g of rice. How much do six people need?|450 g|400 g|600 g|350 g
Round 3.786 to one decimal place.|3.8|3.7|3.79|4.0
What is the capital of Portugal?|Lisbon|Madrid|Porto|Rome
Which ocean lies between Africa and Australia?|the Indian Ocean|the Atlantic Ocean|the Arctic Ocean|the Southern Ocean
On which continent is the Sahara?|Africa|Asia|Australia|South America
Which of these rivers flows through Egypt?|the Nile|the Danube|the Mekong|the Rhine
Which country has the shape of a boot on the map?|Italy|Norway|Ireland|Chile
In which direction does the Sun rise?|the east|the west|the north|the south
What is the highest mountain above sea level?|Mount Everest|Mont Blanc|Kilimanjaro|Mount Fuji
Which of these cities is not a capital?|Sydney|Oslo|Cairo|Lima
What do the lines on a map that join places of the same height show?|how steep the land is|where the roads are|how much it rains|who owns the land
Which language is spoken by most people in Brazil?|Portuguese|Spanish|English|French
What did people use to write on before paper reached Europe?|parchment|plastic|cotton wool|rubber
Which invention made it possible to print many copies of a book cheaply?|movable type|the quill|the telescope|the abacus
Who painted the ceiling of the Sistine Chapel?|Michelangelo|Rembrandt|Picasso|Monet
Which wall came down in 1989?|the Berlin Wall|Hadrian's Wall|the Great Wall of China|the walls of Troy
What was the main use of the aqueducts of the Romans?|to bring water to the towns|to keep out enemies|to store grain|to race chariots
Which of these was invented last?|the microwave oven|the bicycle|the steam engine|the compass
In what kind of state do the citizens choose those who govern?|a democracy|a monarchy without a parliament|a dictatorship|an empire
Which word is a noun?|freedom|quickly|green|under
Which word means the opposite of 'generous'?|stingy|gentle|rich|famous
Choose the right form: Neither of the answers ___ correct.|is|are|were|be
Which sentence is in the past tense?|They walked home.|They walk home.|They will walk home.|They are walking home.
What is the plural of 'mouse'?|mice|mouses|mouse's|meese
Which word rhymes with 'though'?|snow|cough|tough|plough
What does the prefix 're-' mean in 'rewrite'?|again|not|before|under
Which punctuation mark ends a question?|a question mark|a comma|a colon|a hyphen
What do we call a word that sounds like what it means, such as 'buzz'?|an onomatopoeia|a metaphor|a pronoun|an acronym
'The classroom was a zoo.' What is this?|a metaphor|a fact|a question|a rhyme
What is the best thing to do if oil in a pan catches fire?|cover it with a lid|pour water on it|carry it outside|fan it with a towel
Which of these should be kept in a refrigerator?|fresh fish|dry rice|honey|salt
The traffic light turns yellow as you come near. What does it mean?|be ready to stop|drive faster|turn left|switch on the lights
You need to be at the station at 9:15 and the walk takes 25 minutes. When must you leave at the latest?|8:50|9:00|8:40|9:05
What should you do first when a computer program does not answer any more?|wait a moment, then close it|buy a new computer|unplug the screen|delete the program
Which of these is the safest password?|four random words in a row|your first name|123456|the name of your street
Someone says: 'I could eat a horse.' What do they mean?|they are very hungry|they keep horses|they dislike horses|they are a cook
Why do we put a stamp on a letter?|to pay for its delivery|to keep it closed|to make it heavier|to show who wrote it
What does a receipt prove?|that something was paid for|that a thing is new|that a shop is open|that a price is fair
Where would you look for the meaning of an unknown word?|in a dictionary|in an atlas|on a receipt|in a timetable
Maria is taller than Ida, and Ida is taller than Paul. Who is the shortest?|Paul|Maria|Ida|it cannot be known
All of the boxes in the cellar are empty. Tom's box is in the cellar. What follows?|Tom's box is empty|Tom's box is full|Tom owns all of the boxes|the cellar is locked
The glass fell off the table and landed on the stone floor. What most likely happened next?|the glass broke|the table broke|the glass flew up|the floor became soft
Which of these weighs the most?|a car|a bicycle|a suitcase|a pillow
Lena put her coat and scarf on before she left. What was the weather like?|cold|hot|it cannot have been winter|there was no weather
What does a programmer call a mistake in a program?|a bug|a byte|a cursor|a patch
Which of these keeps data when the power is off?|a hard disk|a processor|a lamp|a loudspeaker
In a program, what does a loop do?|it repeats steps|it stores colours|it prints paper|it draws a circle
What is the binary number 101 in decimal notation?|5|3|101|6
Which instrument has black and white keys?|the piano|the violin|the trumpet|the drum
How many players of one team are on the field in a football match?|11|9|7|15
Which colours give green when they are mixed as paints?|blue and yellow|red and white|black and red|orange and purple
Which season comes after autumn in the northern half of the Earth?|winter|spring|summer|none of these
How many strings does a violin have?|four|six|eight|twelve
A tree trunk has 80 rings. What does that tell us?|it is about 80 years old|it is 80 metres tall|it lost 80 branches|it is 80 cm thick
Why do astronauts float inside a space station?|they and the station fall around the Earth together|there is no air in it|the station has no walls|their suits are filled with gas
Which of these is a mammal?|the bat|the penguin|the crocodile|the shark
Why does bread dough rise?|yeast makes bubbles of gas in it|flour grows in the warmth|salt swells|the bowl pushes it up
What would happen to a plant that is kept in a dark cupboard for weeks?|it would turn pale and weak|it would grow more flowers|it would become a root|nothing at all
Which simple machine is a ramp?|an inclined plane|a pulley|a lever|a wheel and axle
What do rust and a burning candle have in common?|oxygen takes part in both|both need wax|both give much light|both are found only in water
Which is the best way to find out whether plants grow better with music?|grow two groups alike, with music for one only|ask a gardener|play music to one plant and look at it|read a poem about plants
Water is poured from a tall glass into a wide bowl. What stays the same?|its volume|its height|its shape|its surface
"""  # noqa: E501 (a table)


def questions_text() -> Text:
    """Documents of one question each, in three layouts in turn; the right choice is at every letter equally often."""
    items = [line.split("|") for line in _ITEMS.strip().split("\n")]
    documents = tuple(_lay_out(i, question, answers) for i, (question, *answers) in enumerate(items))
    return Text("questions", ("\n\n".join(documents),), license=LICENSE)


def _lay_out(i: int, question: str, answers: list[str]) -> str:
    at = i * 7 // 3 % 4  # not i % 4: every layout must see every letter
    choices = [*answers[1 : at + 1], answers[0], *answers[at + 1 :]]
    if i % 3 == 0:
        return f"Question: {question}\nAnswer: {answers[0]}"
    if i % 3 == 1:
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
        return f"{question}\n{listed}\nAnswer: {_LETTERS[at]}. {answers[0]}"
    listed = ", ".join(f"({n}) {choice}" for n, choice in enumerate(choices, start=1))
    return f"Q: {question} Choose one: {listed}.\nA: ({at + 1}) {answers[0]}"
